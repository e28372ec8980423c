"""Proposes rules where the names or the arrangement of checkpoint and target differ."""

from orbax_nnx_handler.planning.likeness.joined_parts import Remade
from orbax_nnx_handler.planning.suggesting.proposing import propose
from orbax_nnx_handler.planning.suggesting.questions import CHOICES, Question
from orbax_nnx_handler.planning.suggesting.suggestion import (
    BY_NUMBER,
    RUN_BOTH,
    Answers,
    Confidence,
    Proposal,
    Suggestion,
)
from orbax_nnx_handler.planning.target.roles import Order, creation_order, order_of

__all__ = [
    "BY_NUMBER",
    "CHOICES",
    "RUN_BOTH",
    "Answers",
    "Confidence",
    "Order",
    "Proposal",
    "Question",
    "Remade",
    "Suggestion",
    "creation_order",
    "order_of",
    "propose",
]
