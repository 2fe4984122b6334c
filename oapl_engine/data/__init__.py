"""Where prompts come from: sources of problems, their rendering, and an order that resumes by an integer."""

from oapl_engine.data.task import Task, load_task

__all__ = ["Task", "load_task"]
