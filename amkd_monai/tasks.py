"""The tasks of the package, see :mod:`amkd_monai.data.datasets`."""

from amkd_monai.data.datasets import TASKS, Task, get_task

__all__ = ["TASKS", "Task", "get_task"]
