"""Compares what a wheel and an sdist hold with the files of the repository."""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

PACKAGE = "orbax_nnx_handler/"
# Neither of use without the repository itself.
LEFT_OUT = (".gitattributes", ".github/", ".pre-commit-config.yaml")


def names_in(archive: pathlib.Path) -> set[str]:
    """Returns the names of the files, those of an sdist without its folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {member.name.partition("/")[2] for member in sdist if not member.isdir()}


def main() -> None:
    """Ends with a message where a file is absent or strange."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.splitlines())
    faults: list[str] = []
    for archive in map(pathlib.Path, sys.argv[1:]):
        names = names_in(archive)
        if archive.suffix == ".whl":
            wanted = {name for name in tracked if name.startswith(PACKAGE)}
            names = {name for name in names if ".dist-info/" not in name}
        else:
            wanted = {name for name in tracked if not name.startswith(LEFT_OUT)}
            names -= {"PKG-INFO"}
        print(f"{archive.name}: {len(names)} files of {len(tracked)} in the repository")
        faults += [f"{archive.name} lacks {name}" for name in sorted(wanted - names)]
        faults += [f"{archive.name} holds {name}" for name in sorted(names - wanted)]
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
