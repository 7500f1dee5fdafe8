"""The steps of the first hour on a GPU, at tiny sizes and without one; their limits; what is read from other tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_compile
import gpu_lines
import gpu_rows
import gpu_steps
import gpu_trace
import pytest
import torch
from helpers.pretended_gpu import pretended_gpu

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def step(number, folder, scratch):
    """The lines of a step, by part."""
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [BENCH / "gpu.sh", folder, str(number), "--tiny", "--scratch", scratch]
    done = subprocess.run(command, env=os.environ | tools, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / gpu_lines.NAME).read_text().splitlines()]
    lines = {name: [row for row in rows if row["part"] == name] for name in gpu_steps.STEPS[str(number)]}
    for name in lines:
        assert lines[name][-1]["end"] == "done", (folder / f"{name.replace(' ', '-')}.txt").read_text()[-4000:]
        assert not any("wrong" in row for row in lines[name])
    return lines


def test_kernels_are_compiled_and_tested(tmp_path, scratch):
    lines = step(1, tmp_path, scratch)
    (row,) = (row for row in lines["compile"] if "case" in row)
    assert (row["target"], row["spills"]) == ("sm_90", 0)
    assert row["registers"] > 0
    (row,) = (row for row in lines["kernel tests"] if "ends" in row)
    assert (row["end_of_tests"], set(row["ends"]), row["failed"]) == ("status 0", {"PASSED"}, [])
    assert row["ends"]["PASSED"] > 5


def test_products_stand_beside_the_library_and_their_roof(tmp_path, scratch):
    lines = step(2, tmp_path, scratch)
    assert {row.get("roof") for row in lines["roofs"]} == {"copy", "bf16", "tf32", "ieee", None}
    for part in ("product", "gram", "cross"):
        ways = [row["way"] for row in lines[part] if "way" in row]
        assert ways == ["bare", "triton"] * 2
        assert all(row["share_of_roof"] > 0 for row in lines[part] if "way" in row)
        assert sum("speed_of_the_library" in row for row in lines[part]) == 2
    assert sum("products_in_bf16" in row for row in lines["exact"]) == 2


def test_row_kernels_are_timed_and_repeated(tmp_path, scratch):
    lines = step(3, tmp_path, scratch)
    assert {row["operation"] for row in lines["row kernels"][:-1]} == set(gpu_rows.OPERATIONS)
    assert [row["runs_that_differ"] for row in lines["repeats"][:-1]] == [0] * len(gpu_rows.REPEATED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: no need to pretend one")
@pytest.mark.parametrize("name", gpu_rows.OPERATIONS)
def test_the_host_does_not_wait_in_what_is_timed(name, monkeypatch):
    """Its wait would count as the kernel's time."""

    def normal(*shape, dtype=torch.float32, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)

    monkeypatch.setattr(gpu_rows, "DEVICE", "cuda")
    monkeypatch.setattr(gpu_rows, "normal", normal)
    with pretended_gpu() as gpu:
        run, fresh, _ = gpu_rows.OPERATIONS[name](8, 32)
        arguments = fresh()
        gpu.waits.clear()
        run(*arguments)
        assert not gpu.waits


@pytest.mark.parametrize("number", [4, 5])
def test_runs(number, tmp_path, scratch):
    lines = step(number, tmp_path, scratch)
    for name, rows in lines.items():
        (row,) = (row for row in rows if "peak_memory" in row)
        assert 0 < row["relative_error"] < 1, name
        assert row["seconds"]["solve"] > 0
    if number == 5:
        same = [row for rows in lines.values() for row in rows if any("same_bytes" in name for name in row)]
        assert [value for row in same for name, value in row.items() if "same_bytes" in name] == [True] * 3


def test_limits_of_a_step_fit_into_eight_minutes():
    assert max(sum(limit for limit, _ in parts.values()) for parts in gpu_steps.STEPS.values()) <= 470


@pytest.mark.parametrize(
    ("code", "limit", "end"),
    [
        ("", 20, "done"),
        ("import subprocess; subprocess.Popen(['sleep', '600']); time.sleep(600)", 2, "cut off after 2 s"),
        ("raise RuntimeError('an illegal memory access')", 20, "failed with status 1"),
        ("os.kill(os.getpid(), 9)", 20, "failed with status -9"),
    ],
)
def test_a_part_leaves_its_lines_and_says_how_it_ended(code, limit, end, tmp_path, monkeypatch):
    module = f"import sys, time, os\nsys.path.insert(0, {str(BENCH / 'gpu')!r})\n"
    module += "from gpu_lines import Part\nfrom pathlib import Path\n"
    module += f"part = Part('a part', Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))\npart.add(value=1)\n"
    monkeypatch.setattr(gpu_steps, "command_of", lambda part: [sys.executable, "-c", module + code])
    part = gpu_lines.Part("a part", tmp_path, tmp_path)
    gpu_steps.run_limited(part, limit)
    first, last = part.lines("a part")
    assert first["value"] == 1
    assert last["end"].startswith(end)
    if code.startswith("raise"):
        assert last["last_lines"][-1] == "RuntimeError: an illegal memory access"


def test_targets_of_cards():
    targets = {80: "sm_80", 89: "sm_80", 90: "sm_90", 100: "sm_100", 120: "sm_100"}
    assert {number: gpu_compile.target_of(number) for number in targets} == targets


@pytest.mark.parametrize("line", ["[gw1] [ 50%] {1} {0} ", "{0} {1}   [ 50%]"], ids=["workers", "one process"])
def test_results_of_pytest(line, tmp_path):
    ends = [("a.py::one[x-1]", "PASSED"), ("a.py::two", "FAILED"), ("a.py::three", "SKIPPED"), ("b.py::four", "ERROR")]
    path = tmp_path / "results.txt"
    path.write_text("\n".join(["collected 4 items", "a.py::one[x-1] ", *(line.format(*end) for end in ends)]))
    found = gpu_compile.results_of(path)
    assert found["ends"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1, "ERROR": 1}
    assert found["failed"] == [line.format(*ends[n]) for n in (1, 3)]


def test_bits_that_differ_are_counted():
    values = iter([1.0, 1.0, -0.0, torch.nan, torch.nan])
    # From one state: 1, 1, -0, NaN.
    told = gpu_rows.differing(lambda x: torch.tensor([0.0, x]), lambda: (next(values),), 4)
    assert told == {"repeats": 4, "runs_that_differ": 2, "most_entries_that_differ": 1}
    assert gpu_rows.differing(lambda: torch.tensor([torch.nan]), tuple, 3)["runs_that_differ"] == 0


def test_summary_of_a_trace(tmp_path):
    """Two streams; kernels run from 0 to 40, 30 to 50 and 90 to 100 microseconds."""

    def event(cat, name, ts, dur, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    copy = "Memcpy HtoD (Pinned -> Device)"
    events = [event("kernel", "b", 90, 10), event("kernel", "a", 0, 40), event("kernel", "a", 30, 20)]
    events += [event("gpu_memcpy", copy, at, 5, bytes=100_000) for at in (10, 20)]
    events += [event("cpu_op", "aten::mm", 0, 500), {"ph": "M", "name": "process_name"}]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = gpu_trace.summary(path)
    assert (found["kernels"], found["span_s"]) == (3, pytest.approx(100e-6))
    assert found["idle_share"] == pytest.approx(0.4)
    assert found["longest_gaps"] == [{"ms": 0.04, "after": "a", "before": "b"}]
    (copies,) = found["copies"]
    assert (copies["count"], copies["gbs"]) == (2, pytest.approx(20))
    kernels = [(row["name"], row["count"], row["share"]) for row in found["longest_kernels"]]
    assert kernels == [("a", 2, pytest.approx(0.6)), ("b", 1, pytest.approx(0.1))]
    path.write_text(json.dumps({"traceEvents": []}))
    assert gpu_trace.summary(path) == {"kernels": 0}


LAUNCH = """
import compiled, compiled_cases, gpu_compile
gpu_compile._cases(90)
score, fixed = compiled_cases.empty({rows}, 576), compiled_cases.empty({rows}, 576, compiled_cases.torch.bool)
compiled.compile_launch("here", lambda: compiled_cases.lmo(score, {k}, fixed=fixed, positive=True))
"""


def test_launches_find_what_was_compiled_before(tmp_path):
    """In another process, with another number of rows and another budget: the cache has all that they need."""
    cache = tmp_path / "cache"
    places = {"PYTHONPATH": f"{BENCH.parent}:{BENCH}:{BENCH / 'gpu'}", "TRITON_CACHE_DIR": str(cache)}
    environment = os.environ | places | {"TRITON_INTERPRET": "0"}

    def run(code):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}

    compiled = run("import gpu_compile; gpu_compile.compile_case('lmo 576', 90)")
    assert len(compiled) == 1
    assert run(LAUNCH.format(rows=2048, k=100)) == compiled
    # A number of rows that is no multiple of 16 is another kernel.
    assert len(run(LAUNCH.format(rows=2047, k=100))) == 2
