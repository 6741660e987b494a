"""Calls the C functions of a library as the JSON lines on standard input say, and prints one JSON line for each.

A line is ["contents"], ["workspace_bytes", op_type, element, layout, shapes], or ["launch", op_type, element, layout,
shapes, {"inputs": [address, ...], "outputs": [...], "workspace": address, "stream": address}]. The answer is what the
function returned, or {"error": ...}. It is a program of its own because the fake driver has to be found when it starts.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from gpu.driver_cpp import CppLibrary, CppLibraryError

library = CppLibrary(Path(sys.argv[1]))
for line in sys.stdin:
    name, *arguments = json.loads(line)
    options = arguments.pop() if name == "launch" else {}
    try:
        answer = getattr(library, name)(*arguments, **options)
    except CppLibraryError as error:
        answer = {"error": str(error)}
    if name == "contents":
        answer = [dataclasses.asdict(item) for item in answer]
    print(json.dumps(answer))
