"""Random state that the checkpoint holds in another form than the target wants."""

from collections import defaultdict
from collections.abc import Iterable

from orbax_nnx_handler.planning.core.dtypes import KEY_IMPLEMENTATIONS, same_key
from orbax_nnx_handler.planning.core.errors import Cause, Hint
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, segments
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence

_NONE: list[Path] = []


def find_keys(evidence: Evidence) -> Iterable[Cause]:
    """Yields random keys of another implementation, once for each."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path, item in evidence.mismatched.items():
        stored = item.stored_dtype.removeprefix("key<").removesuffix(">")
        wanted = next((name for name in KEY_IMPLEMENTATIONS if same_key(name, item.wanted.dtype)), "")
        if item.kind == "key" and wanted and stored in KEY_IMPLEMENTATIONS and stored != wanted:
            groups[stored, wanted].append(path)
    for (stored, wanted), paths in groups.items():
        yield Cause(
            kind="KeyImplementation",
            text=f"the checkpoint's random keys are {stored}, the target's {wanted}.",
            paths=tuple(paths),
            way=Hint(
                "build the target under the writer's jax_default_prng_impl, or with keys of that "
                "implementation; another one would draw other numbers."
            ),
            facts={"stored": stored, "wanted": wanted},
        )


def find_random_layouts(evidence: Evidence) -> Iterable[Cause]:
    """Yields stored streams beside wanted ones of the same module, under names that do not meet.

    Flax 0.11 took the stream's name out of a module's own stream:
    `drop/rngs/default/key` became `drop/rngs/key`.
    """
    stored: dict[Tokens, list[Path]] = defaultdict(list)
    for path in [*evidence.verdict.unexpected, *evidence.verdict.skipped]:
        module = _module_of(canonical(evidence.sides.placements[path].path))
        if module is not None:
            stored[module].append(path)
    for path, item in evidence.verdict.defaulted.items():
        wanted = evidence.sides.wanted[path]
        module = _module_of(wanted.tokens)
        sources = next((s for m, s in stored.items() if module and m and _same_end(m, module)), _NONE)
        if item.source != "target" and wanted.role == "random" and path[-1] == "key" and sources:
            there = render(next((s for s in sources if "key" in segments(s)), sources[0]))
            here = render(path)
            renames = [(there, here)]
            yield Cause(
                kind="RandomLayout",
                text=f"the checkpoint holds random streams in the layout of another Flax ({there}), and "
                f"nothing says which of them is {here}: that stream starts afresh.",
                paths=(path, *sources),
                way=Hint(f"pass renames={renames!r} to go on with that stream.", {"renames": renames}),
                facts={"stored": there, "wanted": here},
            )


def _module_of(tokens: Tokens) -> Tokens | None:
    names = tokens[:-1] if tokens[-1] == "value" else tokens
    return names[: names.index("rngs") + 1] if "rngs" in names and names[-1] in ("key", "count") else None


def _same_end(one: Tokens, other: Tokens) -> bool:
    size = min(len(one), len(other))
    return size > 1 and one[-size:] == other[-size:]
