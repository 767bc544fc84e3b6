"""SGD and SAM's family on digits and on CIFAR-10: ``python -m examples.family``.

    python -m examples.family run                              the digits
    python -m examples.family run --cifar FOLDER               and CIFAR-10, from its binary files
    python -m examples.family run --cifar FOLDER --device cuda all of CIFAR-10 instead, on a GPU
    python -m examples.family report                           docs/study.md, from what is there

Each run is one line of ``examples/results/family.jsonl``. A run that is there is not done again, so
whoever is interrupted starts the same command once more.

Where to read
    ``methods.py`` has a line for each method; ``tasks.py`` says on what, how long and with which
    settings; ``training.py`` is one run, and ``plan.py`` the order of all; ``report.py`` makes the
    page and ``figure.py`` its picture.
"""
