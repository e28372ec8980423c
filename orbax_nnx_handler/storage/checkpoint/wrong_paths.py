"""What a path is that is no checkpoint, and which one was probably meant.

Every sentence rests on what lies at the path, above it or right below it; where
nothing does, only the kinds of path that would do are named. Behind a network only a
few folders are looked into, and none above the bucket.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from orbax_nnx_handler.planning.core.errors import Hint, NotACheckpointError
from orbax_nnx_handler.planning.core.paths import printable
from orbax_nnx_handler.storage.checkpoint.directories import (
    COMMIT_FILE,
    CONFIG_FILE,
    STEP_FILE,
    absent_indices,
    archives_in,
    holds_tree,
    index_of,
    is_archive,
    is_item,
    is_noted_step,
    is_replaceable,
    is_root,
    is_temporary,
    is_unfinished,
    is_unfinished_archive,
    items_of,
    lacks_commit,
    newest_in,
    prefixes_of,
    step_names,
    steps_of,
    was_only_begun,
    weights_in,
)
from orbax_nnx_handler.storage.stores.files import Files, SearchEndedError
from orbax_nnx_handler.storage.stores.locations import absolute, parents_of

_SHOWN = 8
# How many folders are looked into on each level, and how many levels.
_LOOKED_AT, _LOOKED_AT_REMOTE = 50, 3
_DEPTH, _DEPTH_REMOTE = 3, 1
# Questions to a store, those of the search for a checkpoint included.
_MOST_ASKED = 17
_NONE_FINISHED = Hint("no finished step lies beside it: the job has to save again.")
ANY_KIND = Hint("pass a CheckpointManager's root, one of its steps, or an item in a step.")
COPY_AGAIN = Hint("copy it again from where it was written: a file is damaged, or was not copied whole.")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that Git LFS keeps in place of a large one (its `docs/spec.md`)."""
_PYTORCHS = (".bin", ".pt", ".pth")
_TENSORFLOWS = (".h5",)


def is_pointer(content: bytes) -> bool:
    """Tells whether a file only says which large one Git LFS would download in its place."""
    return content.startswith(_LFS_POINTER)


def not_downloaded(file: epath.Path) -> NotACheckpointError:
    """Returns the error that a file is such a pointer."""
    hint = Hint("run `git lfs pull` in the clone: it downloads the file itself.")
    return _refusal(f"{file} is a pointer of Git LFS: the weights were not downloaded.", hint)


def no_checkpoint(path: epath.Path, files: Files) -> NotACheckpointError:
    """Returns the error that says what a path is instead of a checkpoint, with a hint."""
    exists = files.exists(path)
    with files.at_most(_MOST_ASKED):
        try:
            return _what_it_is(path, files)
        except SearchEndedError:
            found = f"is no Orbax checkpoint; it holds: {_listed(files.entries(path))}"
            return _refusal(f"{path} {found}." if exists else f"there is nothing at {path}.", ANY_KIND)


def _what_it_is(path: epath.Path, files: Files) -> NotACheckpointError:
    if not files.exists(path):
        return _refusal(f"there is nothing at {path}.", _hint(_instead_of, path, files))
    if is_unfinished(path):
        return interrupted(path, files)
    if index_of(path.name) and files.is_file(path):
        return _of_part(path, files)
    if indices := absent_indices(path, files):
        what = f"{path} holds parts of weights without the index that names them: {_listed(indices)}."
        return _refusal(what, _copy_index(path, indices))
    unfinished = _unfinished_in(path, files)
    if unfinished:
        saves = "a save that was interrupted" if len(unfinished) == 1 else "saves that were interrupted"
        hint = _hint(_finished_near, path, files)
        if hint is _NONE_FINISHED:
            hint = _hint(_finished_in, path / unfinished[-1], files, otherwise=hint)
        return _refusal(f"{path} holds only {saves}: {_listed(unfinished)}.", hint)
    begun = was_only_begun(path, files) if files.is_folder(path) else None
    if begun is not None:
        return interrupted(begun, files)
    if not files.is_folder(path):
        what = "a file" if files.is_file(path) else "no file and no directory"
        return _refusal(f"{path} is {what}.", _hint(_around, path, files))
    return _of_folder(path, files)


def _of_part(path: epath.Path, files: Files) -> NotACheckpointError:
    index = path.parent / index_of(path.name)
    hint = _pass(index, f"pass {index}.") if files.is_file(index) else _copy_index(path.parent, [index.name])
    return _refusal(f"{path} is one of several parts of weights.", hint)


def _copy_index(directory: epath.Path, indices: Iterable[str]) -> Hint:
    return Hint(f"download or copy {_listed(indices)} into {directory} too.")


def _unfinished_in(path: epath.Path, files: Files) -> list[str]:
    """Returns what interrupted saves left in a directory; steps without a mark only where none has one."""
    entries = files.entries(path)
    temporary = [name for name in entries if is_temporary(name)]
    if temporary or steps_of(path, files):
        return temporary
    steps = [path / name for name in step_names(entries).values() if entries[name].kind == "folder"]
    return [step.name for step in steps[-_SHOWN:] if lacks_commit(step, files)]


def check_replaceable(path: epath.Path, files: Files) -> None:
    """Raises where more than one item would go if a save took a path's name.

    Raises:
        NotACheckpointError: A manager's root, a step, or what no checkpoint holds is there.
    """
    if files.exists(path) and not is_replaceable(path, files):
        what = _of_folder(path, files).what if files.is_folder(path) else f"{path} is a file."
        hint = Hint("pass the path of an item, or one at which there is nothing.")
        raise _refusal(f"{what} A save replaces one item and nothing else.", hint)


def _refusal(what: str, hint: Hint) -> NotACheckpointError:
    return NotACheckpointError(printable(what), hints=[hint])


def _pass(path: epath.Path, words: str) -> Hint:
    return Hint(words, {"path": str(path)})


def _of_folder(path: epath.Path, files: Files) -> NotACheckpointError:
    items = items_of(path, files)
    if items and not is_root(path, files):
        others = f", or pass item={items[0].name!r} to restore" if len(items) > 1 else ""
        return _refusal(
            f"{path} is a step, not an item; it holds: {_listed(item.name for item in items)}.",
            _pass(items[0], f"pass {items[0]}{others}."),
        )
    steps = steps_of(path, files)
    newest = items_of(steps[max(steps)], files) if steps else []
    if newest and not is_root(steps[max(steps)], files):
        return _refusal(
            f"{path} is the root of a CheckpointManager, not an item; it holds {_steps(steps)}",
            _pass(newest[0], f"pass {newest[0]}."),
        )
    entries = files.entries(path)
    what = f"no Orbax checkpoint; it holds: {_listed(entries)}" if entries else "an empty directory"
    return _refusal(f"{path} is {what}.", _hint(_near, path, files))


def interrupted(path: epath.Path, files: Files) -> NotACheckpointError:
    """Returns the error that a save was never finished, and which one was."""
    how = "" if is_unfinished(path) else f": it has no {COMMIT_FILE}"
    hint = _hint(_finished_near, path, files)
    if hint is _NONE_FINISHED:
        hint = _hint(_finished_in, path, files, otherwise=hint)
    return _refusal(f"{path} is a save that was interrupted{how}.", hint)


def no_item(step: epath.Path, item: str, files: Files) -> NotACheckpointError:
    """Returns the error that says which items a step holds instead of the one that was asked for."""
    if not files.entries(step) or (not items_of(step, files) and _unfinished_in(step, files)):
        return no_checkpoint(step, files)
    names = [child.name for child in files.folders(step)]
    close = difflib.get_close_matches(item, names, n=1)
    trees = [child.name for child in items_of(step, files)]
    meant = close[0] if close else trees[0] if len(trees) == 1 else ""
    hints = [Hint(f"pass item={meant!r}.", {"item": meant})] if meant else []
    return NotACheckpointError(f"{step} has no item {item!r}; it holds: {_listed(names)}.", hints=hints)


def several_kinds(root: epath.Path, steps: Iterable[epath.Path]) -> NotACheckpointError:
    """Returns the error that the steps of a root have names of several kinds."""
    names = [step.name for step in steps]
    kinds = _listed(f"{prefix}_*" for prefix in prefixes_of(names))
    step = root / names[-1]
    return _refusal(
        f"{root} holds steps of several kinds of names: {kinds}.",
        _pass(step, f"pass one step, such as {step}."),
    )


def damaged(path: epath.Path, files: Files) -> Hint:
    """Returns a hint where a checkpoint's own files are damaged: which other step there is."""
    return _hint(_undamaged_near, path, files, otherwise=COPY_AGAIN)


def _hint(
    find: Callable[[epath.Path, Files], Hint], path: epath.Path, files: Files, otherwise: Hint = ANY_KIND
) -> Hint:
    """Looks around; where that is not allowed, there is something else to say."""
    try:
        return find(path, files)
    except (NotACheckpointError, SearchEndedError):
        return otherwise


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f", ... and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(every[:_SHOWN]) or "nothing") + more


def _finished_near(path: epath.Path, files: Files) -> Hint:
    path = absolute(path)
    if is_unfinished_archive(path):
        archives = newest_in(path.parent, files)
        newest = _listed(map(str, archives))
        return _pass(archives[0], f"the newest finished one is {newest}.") if archives else _NONE_FINISHED
    root = next((part.parent for part in (path, *path.parents) if is_temporary(part.name)), path)
    # An unfinished item lies in a step; what lies beside that is one too if it is called the same.
    around = [root, *parents_of(root)[:2]]
    files.look_into(around[:2])
    for inner, place in zip([root, *around], around, strict=False):
        if inner != root and not inner.name[-1:].isdecimal():
            break  # No step: what lies beside it is none of this manager's.
        steps = {
            step: child
            for step, child in steps_of(place, files).items()
            if child not in (path, inner) and (place == root or _prefix(child) == _prefix(inner))
        }
        if steps:
            newest = steps[max(steps)]
            return _pass(newest, f"the newest finished step is {newest}.")
    return _NONE_FINISHED


def _finished_in(step: epath.Path, files: Files) -> Hint:
    """Returns the finished item of a step without a mark: it was saved by itself, into a bucket."""
    if is_temporary(step.name) or files.optional(step / STEP_FILE) is not None:
        return _NONE_FINISHED
    items = [item for item in items_of(step, files) if files.has_file(item, COMMIT_FILE)]
    if not items:
        return _NONE_FINISHED
    return _pass(
        items[0], f"{items[0]} was finished by itself: pass that, unless a manager was to write more."
    )


def _prefix(step: epath.Path) -> str:
    """Returns what stands before the number in a step's name."""
    return step.name.rstrip("0123456789")


def _instead_of(path: epath.Path, files: Files) -> Hint:
    """Returns what lies near a path that does not exist."""
    scheme, _, below = str(path).partition(":")
    if scheme == "file" and below:
        return _pass(epath.Path(below), f"pass {below!r}.")
    if scheme in ("gs", "s3") and below and not below.startswith("//"):
        url = f"{scheme}://{below.lstrip('/')}"
        lost = ", as a string: pathlib takes one of two slashes away" if below.startswith("/") else ""
        return Hint(f"pass {url!r}{lost}.", {"path": url})
    parents = parents_of(path)
    parent = next((part for part in parents if files.exists(part)), None)
    if parent is None:
        return ANY_KIND
    if not files.is_folder(parent):
        return Hint(f"{parent} is a file.")
    if is_item(parent, files):
        return _pass(parent, f"{parent} is an item directory; pass that.")
    steps = steps_of(parent, files)
    if steps:
        return _newest_of(parent, steps)
    missing = [path, *parents][parents.index(parent)].name
    names = [name for name in files.entries(parent) if name != missing]
    close = difflib.get_close_matches(missing, names, n=2)
    if close and len({difflib.SequenceMatcher(None, name, missing).ratio() for name in close}) == len(close):
        return _pass(parent / close[0], f"did you mean {parent / close[0]}?")
    return Hint(f"{parent} holds: {_listed(names)}.")


def _newest_of(root: epath.Path, steps: Mapping[int, epath.Path], before: str = "") -> Hint:
    return _pass(steps[max(steps)], f"{before}{root} holds {_steps(steps)}")


def _steps(steps: Mapping[int, epath.Path]) -> str:
    """Returns the newest of a manager's steps, with the number of the older ones."""
    newest = list(steps)[-_SHOWN:]
    older = f" and {len(steps) - len(newest)} older ones" if len(steps) > len(newest) else ""
    word = "step" if len(steps) == 1 else "steps"
    return f"the {word} {', '.join(map(str, newest))}{older}."


def _undamaged_near(path: epath.Path, files: Files) -> Hint:
    path = absolute(path)
    archives = archives_in(path.parent, files) if is_archive(path, files) else []
    others = [archive for archive in archives if archive != path]
    if len(archives) > 1:
        beside = _listed(map(str, others))
        return _pass(others[0], f"copy it again, or restore another one that lies beside it: {beside}.")
    item = path if files.is_folder(path) else path.parent
    before = "copy it again, or restore another step: "
    return _other_step(item, files, before) or _other_step(item.parent, files, before) or COPY_AGAIN


def _other_step(step: epath.Path, files: Files, before: str = "") -> Hint | None:
    """Returns which steps lie beside one."""
    for root in parents_of(step)[:1]:
        others = _steps_beside(step, root, files)
        if others and step in steps_of(root, files).values():
            return _newest_of(root, others, before)
    return None


def _steps_beside(path: epath.Path, root: epath.Path, files: Files) -> dict[int, epath.Path]:
    # Names that end in a number are many; a step that is named to a reader holds something.
    return {
        step: child
        for step, child in steps_of(root, files).items()
        if child != path and (files.remote or holds_tree(child, files))
    }


def _near(path: epath.Path, files: Files) -> Hint:
    return _weights(path, files) or _below(path, files) or _foreign(path, files) or _around(path, files)


_DOWNLOAD = "download or copy flax_model.msgpack or model.safetensors too."


def _foreign(path: epath.Path, files: Files) -> Hint | None:
    """Returns what to do with another framework's weights: a checkpoint beside them is another model's."""
    names = [name for name in files.entries(path) if name.endswith((*_PYTORCHS, *_TENSORFLOWS))]
    if not names:
        is_described = CONFIG_FILE in files.entries(path)
        return Hint(f"{CONFIG_FILE} is there without weights: {_DOWNLOAD}") if is_described else None
    whose = "PyTorch's" if names[0].endswith(_PYTORCHS) else "TensorFlow's"
    return Hint(
        f"{names[0]} holds {whose} weights, which are not read: save them as safetensors, or as Flax weights "
        "(flax_model.msgpack)."
    )


def _weights(path: epath.Path, files: Files) -> Hint | None:
    """Returns the file of weights in a directory, of a name that a directory's are not looked for under."""
    found = weights_in(path, files)
    if len(found) > 1:
        return _pass(path / found[0], f"pass one of the files of weights in it: {_listed(found)}.")
    return _pass(path / found[0], f"pass {path / found[0]}.") if found else None


def _below(path: epath.Path, files: Files) -> Hint | None:
    """Returns the checkpoint below a path, if there is one."""
    most = _LOOKED_AT_REMOTE if files.remote else _LOOKED_AT
    folders = [path]
    for _ in range(_DEPTH_REMOTE if files.remote else _DEPTH):
        folders = [child for folder in folders for child in files.folders(folder)]
        folders = [child for child in folders if not is_temporary(child.name)]
        files.look_into(folders[:most])
        # An item's own `ocdbt.process_0` ends in a number as a step does.
        roots: list[epath.Path] = []
        with contextlib.suppress(SearchEndedError):
            roots.extend(child for child in folders[:most] if is_root(child, files))
        found = roots or [child for child in folders[:most] if is_item(child, files)]
        what = "a manager's root" if roots else "an item"
        if len(found) == 1:
            others = ", or another of its folders" if len(folders) > most else ""
            return _pass(found[0], f"{found[0]} is {what}; pass that{others}.")
        if found:
            several = "managers' roots" if roots else "items"
            names = [str(child.relative_to(path)) for child in found]
            return _pass(found[0], f"it holds several {several}; pass one of them: {_listed(names)}.")
        folders = folders[:most]
    return None


def _around(path: epath.Path, files: Files) -> Hint:
    """Returns the checkpoint that a path lies in or beside."""
    path = absolute(path)
    parents = parents_of(path)
    if files.remote:
        parents = parents[:2]
    files.look_into(parents)
    above = next((part for part in parents if files.is_folder(part) and is_item(part, files)), None)
    if above is not None:
        return _pass(above, f"it is a part of the item {above}; pass that.")
    if not parents:
        return ANY_KIND
    # The items of a step belong together; models that lie in one folder do not.
    is_step = parents[0].name.isdecimal() or is_noted_step(parents[0], files)
    beside = items_of(parents[0], files) if is_step else []
    if beside:
        return _pass(beside[0], f"it lies beside the item {beside[0]}; pass that, or the step {parents[0]}.")
    steps = _steps_beside(path, parents[0], files)
    return _newest_of(parents[0], steps) if steps else _other_step(parents[0], files) or ANY_KIND
