"""Procedural tasks: families of problems with a difficulty scale and an exact verifier."""

from karploop.data.tasks.addition import ForwardAddition, ReverseAddition
from karploop.data.tasks.base import Task
from karploop.data.tasks.multiplication import Multiplication
from karploop.data.tasks.registry import get_task, register, task_names
from karploop.data.tasks.strings import Copy, Reverse

__all__ = [
    "Copy",
    "ForwardAddition",
    "Multiplication",
    "Reverse",
    "ReverseAddition",
    "Task",
    "get_task",
    "register",
    "task_names",
]
