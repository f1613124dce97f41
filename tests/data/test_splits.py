import json
from pathlib import Path
from typing import Any

import pytest

from gvsl_lightning.data.splits import (
    Split,
    choose_labelled,
    read_split,
    require_apart_subjects,
    split_cases,
    subjects_of,
)
from gvsl_lightning.errors import InputError


class TestSplit:
    @pytest.mark.parametrize(("val", "test"), [(4, 6), (0.2, 0.3), (4.0, 6.0)])
    def test_parts_are_disjoint_and_complete(self, val, test):
        split = split_cases(20, val, test, seed=3)
        assert (len(split.val), len(split.test)) == (4, 6)
        assert sorted([*split.train, *split.val, *split.test]) == list(range(20))

    def test_by_name_the_last_cases_test_and_those_before_validate(self):
        split = split_cases(20, 3, 5, seed=None)
        assert split.train == tuple(range(12))
        assert split.val == (12, 13, 14)
        assert split.test == tuple(range(15, 20))

    def test_random_split_follows_the_seed(self):
        assert split_cases(20, 4, 4, seed=1) == split_cases(20, 4, 4, seed=1)
        assert split_cases(20, 4, 4, seed=1) != split_cases(20, 4, 4, seed=2)

    def test_every_case_validates_in_one_fold_and_the_test_cases_in_none(self):
        splits = [split_cases(23, 0.2, 3, seed=5, folds=4, fold=fold) for fold in range(4)]
        validated = [index for split in splits for index in split.val]
        assert len({split.test for split in splits}) == 1
        assert sorted([*validated, *splits[0].test]) == list(range(23))
        for split in splits:
            assert not set(split.train) & set(split.val)
            assert len(split.train) + len(split.val) == 20

    def test_every_part_gets_its_share_of_the_classes(self):
        strata = [0] * 40 + [1] * 10
        for seed in range(5):
            split = split_cases(50, 10, 15, seed=seed, strata=strata)
            ill = [sum(strata[case] for case in part) for part in (split.train, split.val)]
            assert ill == [5, 2]
        assert split_cases(50, 10, 15, 0, strata=strata) != split_cases(
            50, 10, 15, 1, strata=strata
        )

    def test_a_share_above_zero_is_at_least_one_case(self):
        assert len(split_cases(5, 0.01, 0.0).val) == 1

    @pytest.mark.parametrize(
        ("val", "test"), [(21, 0), (-1, 0), (1.5, 0), (-0.1, 0), (10, 11), (0, 21.0)]
    )
    def test_amounts_out_of_range(self, val, test):
        with pytest.raises(InputError, match=r"val|test"):
            split_cases(20, val, test)

    def test_file_names_the_cases(self, tmp_path):
        path = tmp_path / "split.json"
        path.write_text(json.dumps({"train": ["c", "a"], "val": ["d"]}))
        split = read_split(path, ["a", "b", "c", "d"])
        assert (split.train, split.val, split.test) == ((2, 0), (3,), ())

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ('{"train": ["a"], "val": ["a"]}', "split.json .*'a'"),
            ('{"train": ["a", "a"]}', "split.json .*'a'"),
            ('{"train": ["z"]}', "split.json .*'z'"),
            ("[1]", "split.json"),
            ("{", "split.json"),
        ],
    )
    def test_wrong_file(self, tmp_path, content, sentence):
        path = tmp_path / "split.json"
        path.write_text(content)
        with pytest.raises(InputError, match=sentence):
            read_split(path, ["a", "b"])


class TestLabelled:
    def test_fewer_labels_are_a_part_of_more(self):
        cases = range(40, 80)
        chosen = [set(choose_labelled(cases, number, seed=2)) for number in (2, 5.0, 0.5, 40)]
        assert [len(one) for one in chosen] == [2, 5, 20, 40]
        assert chosen[0] < chosen[1] < chosen[2] < chosen[3] == set(cases)
        assert set(choose_labelled(cases, 5, seed=3)) != chosen[1]
        assert choose_labelled(cases, None) == tuple(cases)

    def test_classes_take_turns(self):
        strata = [0] * 90 + [1] * 10
        chosen = choose_labelled(range(100), 8, seed=0, strata=strata)
        assert sum(strata[case] for case in chosen) == 4

    def test_more_than_there_are(self):
        with pytest.raises(InputError, match="labelled is 9"):
            choose_labelled(range(8), 9)


class TestSubjects:
    NAMES = tuple(f"sub-{subject:02d}_ses-{visit}" for subject in range(12) for visit in range(3))
    SUBJECTS = subjects_of(NAMES, r"(sub-\d+)")

    @pytest.mark.parametrize("options", [{"seed": 3}, {"seed": None}, {"seed": 1, "folds": 4}])
    def test_no_subject_is_in_two_parts(self, options: dict[str, Any]) -> None:
        split = split_cases(36, 7, 8, groups=self.SUBJECTS, **options)
        parts = [{self.SUBJECTS[case] for case in part} for part in vars(split).values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 12
        assert sorted(case for part in vars(split).values() for case in part) == list(range(36))
        assert len(split.test) == 9  # the wanted number, and the rest of the last subject
        require_apart_subjects(split, self.SUBJECTS)

    def test_every_fold_validates_other_subjects_and_all_of_them(self) -> None:
        found = [
            split_cases(36, 0, 6, folds=3, fold=fold, groups=self.SUBJECTS).val for fold in range(3)
        ]
        assert len(set().union(*found)) == sum(map(len, found)) == 30

    def test_few_labels_take_whole_subjects_first(self) -> None:
        chosen = choose_labelled(range(36), 6, groups=self.SUBJECTS)
        assert len(chosen) == 6
        assert len({self.SUBJECTS[case] for case in chosen}) == 2

    def test_a_split_of_a_file_that_parts_a_subject_is_refused(self) -> None:
        with pytest.raises(InputError, match="sub-00"):
            require_apart_subjects(Split((0,), (1,), ()), self.SUBJECTS)

    def test_a_table_of_groups(self, tmp_path: Path) -> None:
        table = tmp_path / "groups.csv"
        table.write_text("name,group\na,x\nb,x\nc,y\n")
        assert subjects_of(["c", "a", "b"], str(table)) == ["y", "x", "x"]
        for given in (str(table), str(tmp_path / "no.csv"), "(", "nothing"):
            with pytest.raises(InputError):
                subjects_of(["d"], given)
