"""What is learned: text tasks with their templates, answers and accuracy, and the built-in small model."""

from linchain_analysis.problems.loading import PROBLEM_NAMES, load_problem
from linchain_analysis.problems.problem import ProblemDefaults, TextProblem
from linchain_analysis.problems.records import Record

__all__ = ["PROBLEM_NAMES", "ProblemDefaults", "Record", "TextProblem", "load_problem"]
