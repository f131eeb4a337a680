"""Kinds of vectors: each is parsed once, answered by a backend, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from agc_conformance.backend import Backend
from agc_conformance.vectors import Vector
from agc_conformance.verdict import Verdict

__all__ = ["Kind"]

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Kind(Generic[Question, Answer]):
    """The three steps in which a vector of one kind is run.

    Attributes
    ----------
    parse : callable (vector, layout, dtype) -> question
        Reads a vector, for a backend's layout and a dtype.
    answer : callable (backend, question) -> answer
        Asks the backend; if the vector expects an error, it is raised here.
    compare : callable (question, answer) -> Verdict
        Judges the answer.
    """

    parse: Callable[[Vector, str, str], Question]
    answer: Callable[[Backend, Question], Answer]
    compare: Callable[[Question, Answer], Verdict]

    def run(self, backend: Backend, vector: Vector, dtype: str) -> Verdict:
        """Run a vector that expects no error on a backend."""
        question = self.parse(vector, backend.layout, dtype)
        return self.compare(question, self.answer(backend, question))
