"""Results of every kind that a report shows, written by hand."""

from dataclasses import replace

import numpy as np
from rows import of

from seerattn.results.maps import BlockMaps
from seerattn.results.record import Result

EVIL = "<script>alert('x')</script> & $\\bad$"


def result(what: str, name: str, density: float | None, value: float | None, **more) -> Result:
    dense = name == "dense"
    cell = {"data": "abc", "dtype": "float32"} | ({} if dense else {"budget": "density", "block_q": 64, "block_k": 64})
    values = of(name) | {"n": 1000, "unit": "tokens", "model": "m", "text": "books", "context": 4096}
    values["realised_density"] = 1.0 if dense else density and round(density + 0.002, 4)
    values |= {"samples": {"documents": [0, 1]}, "cell": cell | more.pop("cell", {})}
    return Result(what=what, value=value, density=density, **values | more)


LOSSES = {"oracle": 0.25, "best": 0.5, "paper": 1.0, "xattention 8": 1.25, "minference": 1.5, "streaming": 2.0}


def comparison(text: str = "books") -> list[Result]:
    """Two contexts, three densities, with and without dense last rows, with paired errors, times and head densities."""
    rows = []
    for context in (2048, 4096):
        rows.append(result("perplexity", "dense", None, 20.0, context=context, text=text))
        for last in (0, 2):
            for density in (0.5, 0.2, 0.1):
                for name, loss in LOSSES.items():
                    value = 20.0 + loss * 0.1 / density * context / 4096 / (1 + last)
                    settings = of(name)["settings"] | {"last_rows_dense": last}
                    more = {"context": context, "text": text, "settings": settings}
                    rows.append(result("perplexity", name, density, value, **more))
                    rows.append(replace(rows[-1], what="perplexity_difference", stderr=loss / 64, samples={}))
    uneven = {"documents": [0, 1], "head_density": [[0.1, 0.3], [0.2, 0.2]]}
    rows = [replace(r, samples=uneven) if r.method == "minference" and r.samples else r for r in rows]
    times = []
    for r in rows:
        if r.what == "perplexity":
            ms = 8.0 * r.realised_density + 1.0
            samples = {"index": [0.25 * ms], "attention": [0.75 * ms]}
            more = {"n": 3, "unit": "forwards", "cell": r.cell | {"batch": 1}, "samples": samples}
            times.append(replace(r, what="attention_ms", value=ms, **more))
    return rows + times


def everything() -> list[Result]:
    rows = comparison() + comparison(EVIL)
    score = {"task": "niah", "metric": "4096", "documents": 50, "note": "significantly lower"}
    samples = {"score": [0.5], "dense": [0.75], "p": [0.01], "test": ["paired sign flips"]}
    rows.append(result("task_guard", "best", 0.2, -0.25, stderr=0.04, cell=score, samples=samples))
    passkey = {"task": "passkey", "depth": 0.5}
    rows += [result("accuracy", name, d, 0.9, n=10, cell=passkey) for name, d in (("dense", None), ("best", 0.1))]
    error = {"error": ['<img src="http://e.vil/x">']}
    return [*rows, result("failure", "moa", 0.05, None, text=EVIL, samples=error)]


def block_maps(heads: list[tuple[int, int]], size: int = 12) -> BlockMaps:
    rng = np.random.default_rng(0)
    causal = np.tril(np.ones((size, size), dtype=bool))
    forced = causal & (np.eye(size, dtype=bool) | (np.arange(size) == 0))
    target = rng.random((len(heads), size, size)) * causal
    age = np.arange(size)[:, None] - np.arange(size)
    chosen = np.stack([(np.isin(age, [3, 6]) if head % 2 else age < 4) & causal | forced for _, head in heads])
    return BlockMaps(heads, target, target, chosen, forced, "best", 0.2)


def benchmarks() -> list[Result]:
    """Times of attention and of the first token, dense and sparse."""
    rows = []
    for tokens, ms in ((8192, 2.0), (32768, 24.0)):
        cell = {"device": "some GPU", "dtype": "bfloat16", "layers": 32}
        more = {"n": 3, "unit": "runs", "text": "random", "context": tokens}
        blocks = {"block_q": 64, "block_k": 64, "mask_heads": 32, "share": "head"}
        for what in ("attention_ms", "ttft_s", "attention_map_ms"):
            rows.append(result(what, "dense", None, ms, cell=cell | {"impl": "flash"}, **more))
            rows[-1] = replace(rows[-1], cell=cell | {"impl": "flash", "map": False})
        for density in (0.5, 0.1):
            sparse = {"cell": cell | blocks | {"impl": "triton"}, "realised_density": density}
            for what, name in (("attention_ms", "random"), ("selection_ms", "best"), ("ttft_s", "best")):
                row = result(what, name, density, ms * density, **more, **sparse)
                rows.append(replace(row, cell=sparse["cell"]))
    return rows
