"""Print how long source files and functions are: an alarm to look at, not a law.

    python scripts/file_lengths.py

The ten longest files may hold a second question; those under 80 lines may be pages torn out of a
module, unless a library's convention, a light import or a second implementation keeps them apart.
"""

import ast
from pathlib import Path
from statistics import median, quantiles

SOURCE = Path(__file__).parents[1] / "src" / "medusa_exp"


def function_lengths(path: Path) -> list[int]:
    """Return the lines of each function in a file, inner ones too."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, kinds)]
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


def main() -> None:
    """Print the summary, the longest files and the shortest."""
    paths = sorted(SOURCE.rglob("*.py"))
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in paths}
    functions = [length for path in paths for length in function_lengths(path)]
    print(f"{len(lines)} files, {sum(lines.values())} lines")
    for what, lengths in (("file", list(lines.values())), ("function", functions)):
        print(f"{what}: median {median(lengths):.0f} lines, p90 {quantiles(lengths, n=10)[-1]:.0f}")
    by_length = sorted(lines, key=lambda path: -lines[path])
    short = [path for path in by_length if lines[path] < 80 and path.name != "__init__.py"]
    for title, chosen in (("longest", by_length[:10]), ("under 80 lines", short)):
        print(f"{title}:")
        for path in chosen:
            print(f"  {lines[path]:4} {path.relative_to(SOURCE)}")


if __name__ == "__main__":
    main()
