"""What may reach a scorer that evaluates answers.

Some of reasoning-gym's scorers hand the answer to `eval` or to sympy's parser, which is `eval` too. An answer is
written by a model, so it is data: those scorers only see a literal, or an expression of numbers, names and
arithmetic whose powers are small. Anything else scores 0 before it gets there. Left out: a time limit; the bounds
below keep what passes small instead.
"""

from __future__ import annotations

import ast
import re

LITERAL_SCORERS = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
EXPRESSION_SCORERS = frozenset(
    {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"}
)
FUNCTIONS = frozenset({"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh"})
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UAdd, ast.USub)
LARGEST_NUMBER = 10**12
LARGEST_POWER = 64
LARGEST_POWER_OF_SUM = 4  # expanding (a+b+c)**n is what takes time
LONGEST_EXPRESSION = 256
LONGEST_ANSWER = 4096
WORDS = re.compile(r"[\w\s.]*")


def may_be_scored(dataset: str, answer: str, longest: int = LONGEST_ANSWER) -> bool:
    """Whether an answer is short and, where the scorer evaluates, harmless."""
    if not answer or len(answer) > longest:
        return False
    if dataset in LITERAL_SCORERS:
        # A matrix or board as text is words and dots, which can call nothing.
        return _is_literal(answer) or WORDS.fullmatch(answer) is not None
    if dataset in EXPRESSION_SCORERS:
        return len(answer) <= LONGEST_EXPRESSION and _is_arithmetic(answer)
    return True


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _is_arithmetic(text: str) -> bool:
    try:
        return _allowed(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= LARGEST_NUMBER
        case ast.Name(id=name):
            return name in FUNCTIONS or name == "E" or name == "pi" or len(name) == 1
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in FUNCTIONS and _allowed(argument)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            largest = LARGEST_POWER_OF_SUM if isinstance(left, ast.BinOp) else LARGEST_POWER
            return _is_small(right, largest) and _allowed(left) and not _has_power(left)
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, OPERATORS) and _allowed(left) and _allowed(right)
        case ast.UnaryOp(op=operator, operand=operand):
            return isinstance(operator, OPERATORS) and _allowed(operand)
    return False


def _is_small(node: ast.AST, largest: int) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_small(operand, largest)
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= largest
    return False


def _has_power(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Pow) for inner in ast.walk(node))
