"""Table 1 of the paper (GVSL, He et al., CVPR 2023)."""

TASKS = ("SHC", "SAC", "CCC", "SBM")
"""Heart structures and coronary arteries in CT, COVID-19 in CT, brain tissues in MR."""

_TABLE = """
Scratch             | 21.9 10.0 52.7 56.4 | 87.8 80.4 74.4 89.7
Denoising           | 31.4  9.3 57.9 28.3 | 90.3 80.5 75.6 89.7
In-painting         | 32.3  5.9 57.1 25.0 | 90.4 80.3 79.9 89.9
Models Genesis      | 47.4 22.5 60.4 44.9 | 90.3 79.9 80.7 89.4
Rotation            | 56.1 21.9 62.1 54.1 | 90.6 81.1 77.1 89.6
DeepCluster         | 55.9  4.4 57.9 67.5 | 85.4 80.5 59.9 89.1
SimSiam             | 56.5  9.7 61.0 66.2 | 87.5 80.1 73.6 89.8
BYOL                | 46.9  8.6 53.7 52.7 | 88.6 80.7 76.5 89.5
SimCLR              | 48.7 15.5 61.3 58.7 | 86.9 79.9 74.3 89.3
without Z-matching  | 49.1 21.1 55.8 45.1 | 88.3 81.2 81.3 89.7
without restoration | 45.3  0.0 58.8 48.5 | 87.0 79.5 76.6 89.0
without affine head | 57.7 17.9 57.6 53.4 | 89.4 82.3 79.8 89.8
GVSL                | 68.4 28.7 60.8 79.9 | 91.2 81.3 82.2 90.0
"""
"""In %: linear evaluation of the four tasks, then fine-tuning. AUROC for CCC, else Dice."""


def paper_score(method: str, task: str, linear: bool) -> float | None:
    """The paper's score of a method in %; None for a method that the paper does not have.

    Args:
        method: name as in table 1, in upper or lower case.
        task: one of ``TASKS``.
        linear: of linear evaluation; otherwise of fine-tuning.
    """
    for line in _TABLE.strip().splitlines():
        name, probed, tuned = line.split("|")
        if name.strip().casefold() == method.casefold():
            return float((probed if linear else tuned).split()[TASKS.index(task)])
    return None
