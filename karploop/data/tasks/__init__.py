"""Tasks: families of problems with a difficulty scale and a gold verifier."""

from karploop.data.tasks.addition import ForwardAddition, ReverseAddition
from karploop.data.tasks.base import Task
from karploop.data.tasks.dataset import DatasetTask, Problem
from karploop.data.tasks.multiplication import Multiplication
from karploop.data.tasks.registry import get_task, home_module, register, task_names
from karploop.data.tasks.scratchpad import ScratchpadAddition
from karploop.data.tasks.strings import Copy, Reverse

__all__ = [
    "Copy",
    "DatasetTask",
    "ForwardAddition",
    "Multiplication",
    "Problem",
    "Reverse",
    "ReverseAddition",
    "ScratchpadAddition",
    "Task",
    "get_task",
    "home_module",
    "register",
    "task_names",
]
