"""`orbax-nnx suggest`: rules for names that nobody but the user can know."""

import argparse
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orbax_nnx_handler import api
from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_path,
    add_target,
    add_tolerance,
    asked_for,
    described,
    rename_options,
)
from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.commands.user_code import PAIR_HELP, UsageError, load_pair
from orbax_nnx_handler.planning.core.errors import as_python
from orbax_nnx_handler.planning.core.paths import printable, spelled
from orbax_nnx_handler.planning.rules import Rename, Rule
from orbax_nnx_handler.planning.suggesting import (
    BY_NUMBER,
    RUN_BOTH,
    Confidence,
    Question,
    Suggestion,
)

_STYLES: Mapping[Confidence, str] = {"certain": "bold green", "likely": "bold yellow", "open": "bold red"}


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "suggest",
        help="rules for names that differ",
        **described(
            "Proposes rules, as Python, where a target's names are not the checkpoint's. Reads "
            "metadata only (but for --verify) and applies nothing. Exit status: 0 a proposal for "
            "everything, 1 something is open or not proven by --verify.",
            "orbax-nnx suggest run model.py:make --write rules.py",
        ),
    )
    add_path(parser)
    add_target(parser)
    parser.add_argument(
        "--write",
        metavar="FILE.py",
        help="write the rules, those that were given included, as a Python file to be edited: it is what "
        "--rules takes",
    )
    parser.add_argument(
        "--verify",
        metavar="FILE.py:PAIR",
        help=f"run both programs to settle what is open and to prove the whole; {PAIR_HELP}",
    )
    add_tolerance(parser)
    add_item(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Prints the proposal."""
    factory, options = asked_for(arguments)
    file = None if arguments.write is None else _free(pathlib.Path(arguments.write))
    pair = None if arguments.verify is None else load_pair(arguments.verify)
    if pair is None and arguments.tolerance is not None:
        raise UsageError("--tolerance is of the outputs that --verify compares.")
    with screen.waiting("searching"):
        suggestion = api.suggest(
            arguments.path, init=factory, verify=pair, tolerance=arguments.tolerance, **options
        )
    if file is not None:
        file.write_text(
            written(suggestion, options["renames"], f"{arguments.path} {arguments.target}", file.name)
        )
    if arguments.json:
        screen.json(_to_dict(suggestion))
    else:
        coverage, rules = _at_a_prompt(suggestion).split("\n", 1)
        screen.say(coverage, _STYLES[suggestion.confidence])
        # Never broken in the width of a terminal: it is to be pasted.
        screen.say(rules)
        words = _options(suggestion)
        if words:
            screen.say(f"# on the command line: {words}")
    return 1 if suggestion.confidence == "open" else 0


def _free(file: pathlib.Path) -> pathlib.Path:
    if file.suffix != ".py":
        raise UsageError(f"--write {file} is no FILE.py.")
    if file.exists():
        raise UsageError(f"--write {file}: there is a file already; nothing is overwritten.")
    if not file.parent.is_dir():
        raise UsageError(f"--write {file}: there is no folder {file.parent}.")
    if not os.access(file.parent, os.W_OK):
        raise UsageError(f"--write {file}: nothing may be written in {file.parent}.")
    return file


def written(suggestion: Suggestion, settled: Sequence[Rule], words: str, file: str) -> str:
    """Returns a Python file that holds the rules, to be edited.

    Args:
        suggestion: The proposal; what it leaves open stands below the rules as comments.
        settled: The rules that were given.
        words: The checkpoint and the factory, as on the command line.
        file: The file's name.
    """
    open_ = _answers(suggestion)
    rules = [*settled, *suggestion.renames]
    every = map(_as_code, [*rules, *(rule for _, rules in open_ for rule in rules)])
    names = sorted({code.partition("(")[0] for code in every} - {""})
    head = f"Rules that `orbax-nnx suggest` proposed: check them. `--rules {file}` takes them, as in\n\n"
    head += f"    orbax-nnx plan {words} --rules {file}\n"
    lines = [*_docstring(head), ""]
    lines += [f"from orbax_nnx_handler import {', '.join(names)}", ""] if names else []
    lines += ["RULES = [", *(f"    {_as_code(rule)}," for rule in settled)]
    lines += [*_with_answers(suggestion, open_), "]"]
    notes = [line for line in _at_a_prompt(suggestion).splitlines() if line.startswith("#")]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


_Answer = tuple[str, Sequence[Rule]]
"""What a question is answered with, in words, and the complete rules under it."""


def _answers(suggestion: Suggestion) -> list[_Answer]:
    return [
        (f"question {number}, {at}: {choice}", question.alternatives[at])
        for number, question in enumerate(suggestion.questions, 1)
        for at, choice in enumerate(question.choices)
    ]


def _with_answers(suggestion: Suggestion, answers: Sequence[_Answer]) -> Iterator[str]:
    """Yields the lines of rules, what each rests on, and in their places, as comments, those of answers.

    An answer that changes other rules too stands behind them, with all its rules.
    """
    rules = suggestion.renames
    added: list[list[str]] = [[] for _ in range(len(rules) + 1)]
    for words, every in answers:
        rest, new = list(rules), list[tuple[int, Rule]]()
        for rule in every:
            if rest[:1] == [rule]:
                rest.pop(0)
            else:
                new.append((len(rules) - len(rest), rule))
        if rest:
            new = [(len(rules), rule) for rule in every]
            words += " (with all rules, instead of those above)"
        for count, place in enumerate(sorted({place for place, _ in new})):
            codes = [_as_code(rule) for at, rule in new if at == place]
            said = words.partition(":")[0] + " too" if count else words
            added[place] += [f"    # {printable(said)}", *(f"    # {code}," for code in codes)]
    for place, lines in enumerate(added):
        yield from lines
        for item in suggestion.proposals[place : place + 1]:
            yield f"    {_as_code(item.rule)}," + (f"  # {printable(item.why)}" if item.why else "")


def _at_a_prompt(suggestion: Suggestion) -> str:
    """Returns a proposal in words that say how its questions are settled at a prompt."""
    lines = str(suggestion).replace(RUN_BOTH, "--verify FILE.py:PAIR").splitlines()
    by_number = "# the rules under each answer: as comments in what --write writes, and in --json."
    return "\n".join(by_number if line.startswith(f"# {BY_NUMBER}") else line for line in lines)


def _as_code(rule: Rule) -> str:
    return str(rule) if isinstance(rule, Rename) else as_python(rule)


def _docstring(text: str) -> list[str]:
    # A path may hold quotes, backslashes and line breaks.
    safe = "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in text.split("\n"))
    quoted = safe.replace("\\", "\\\\").replace('"""', "'" * 3)
    return [*f'"""{quoted}"""'.splitlines()]


def _options(suggestion: Suggestion) -> str:
    """Returns the rules as options, where all of them can be."""
    return " ".join(rename_options(suggestion.renames) or ())


def _to_dict(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "coverage": suggestion.coverage,
        "covered": suggestion.covered,
        "wanted": suggestion.wanted_count,
        "confidence": suggestion.confidence,
        "renames": [str(rule) for rule in suggestion.renames],
        "grounds": [item.why for item in suggestion.proposals],
        "options": _options(suggestion),
        "questions": [_question_to_dict(question) for question in suggestion.questions],
        "unmatched_wanted": [spelled(path) for path in suggestion.unmatched_wanted],
        "unmatched_stored": [spelled(path) for path in suggestion.unmatched_stored],
        "resized": list(suggestion.resized),
        "problem": suggestion.problem,
        "proof": suggestion.proof,
        "flattened": [spelled(path) for path in suggestion.flattened],
    }


def _question_to_dict(question: Question) -> dict[str, Any]:
    return {
        "question": str(question),
        "wanted": [spelled(path) for path in question.wanted],
        "stored": [spelled(path) for path in question.stored],
        "choices": list(question.choices),
        "alternatives": [[str(rule) for rule in rules] for rules in question.alternatives],
    }
