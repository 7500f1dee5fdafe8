"""The tables of the benchmarks: rows, roofs and shares of a results file of pytest-benchmark."""

import tables


def bench(name, params, median, flops, bytes, unit=None):
    stats = {"median": median, "q1": median / 2, "q3": median * 2}
    known = {"flops": flops, "bytes": bytes, "unit": unit, "note": "", "device": "card", "torch": "1", "triton": "2"}
    return {"name": name, "params": params, "stats": stats, "extra_info": known}


RESULTS = {
    "benchmarks": [
        bench("test_copy", None, 1.0, 0, 1000),
        bench("test_matmul[bf16]", {"precision": "bf16"}, 1.0, 8000, 1, "bf16"),
        bench("test_product[x]", {"way": "triton", "shape": [3, 4], "precision": "bf16"}, 2.0, 8000, 500, "bf16"),
        bench("test_product[y]", {"way": "bare", "shape": [3, 4], "precision": "bf16"}, 1.0, 8000, 500, "bf16"),
        bench("test_step[x]", {"way": "triton", "shape": [3, 4]}, 4.0, 10**9, 1000),
    ]
}


def test_rows_and_shares_of_measured_roofs():
    rows = tables.rows_of(RESULTS)
    roofs = tables.roofs_of(rows)
    assert roofs == {"bf16": 8000.0, "copy": 1000.0}
    # A step is bound by its bytes, not by its flops.
    assert [tables.share(row, roofs) for row in rows[2:]] == [0.5, 1.0, 0.25]
    assert [row["case"] for row in rows[2:]] == ["3 x 4, bf16", "3 x 4, bf16", "3 x 4"]


def test_lines_compare_with_ours():
    lines = tables.table(tables.rows_of(RESULTS)).splitlines()
    assert lines[0] == "card, torch 1, triton 2"
    ours, bare = (line.split() for line in lines if line.startswith("product"))
    assert ours[-4:] == ["triton", "2000.000", "50%", "1.00"]
    assert bare[-4:] == ["bare", "1000.000", "100%", "0.50"]
