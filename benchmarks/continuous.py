"""Continuous memory: perdure beside a plain transcription of the published algorithm, and beside the arithmetic alone.

The yardstick does what the ∞-former's published code does, step by step, in PyTorch: dense G, every score q·k, M
resampled positions. The limit is the time of the matrix products and of the exps and erfs of the cheapest dense exact
algorithm, measured here at these shapes. All take turns in one process on one thread, and CPU time is measured, so that
a busy machine slows all alike; medians over rounds are shown. "Construction" is what the first update of a new (N, L,
M) costs beyond a repeated one: factorisation, recurrence, rounding to float32 and the search for windows.
"Attend" looks as widely as before training; "focused" through densities so narrow that no place can be spared.

    nox -s bench -- continuous --shapes=512/512 --rounds=9
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perdure.core import density, ridge
from perdure.core.basis import Basis
from perdure.core.consolidation import Scheme, fitted, updated
from perdure.core.expectation import fewer_places
from perdure.core.gibbs import gibbs_shares
from perdure.core.looking import affine
from perdure.core.positions import resample
from retrieval import machine
from threadpoolctl import threadpool_limits

import perdure

WIDTHS = {"published": (0.005, 0.01), "scaled": None}  # scaled to N: what gaussian_basis takes by default
E, HEADS, DIM, SAMPLES, BINS = 768, 8, 64, 512, 128
TAU, RIDGE = 0.5, 1e-3
FOCUS = {"attend": 1.0, "focused": 1e-4}  # factor on variances, which are 0.7 before training; focused: all functions
STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "best": min}
chosen = "median"
RESULTS = Path(__file__).parent / "results"


class Published:
    """The published algorithm, transcribed for one row in float32; G is built in advance, as theirs is."""

    def __init__(self, scheme: Scheme, length: int):
        self.mu, self.sigma = (
            torch.from_numpy(a.astype(np.float32)) for a in (scheme.basis.centers, scheme.basis.widths)
        )
        self.G = torch.from_numpy(scheme.first(length).matrix.T.astype(np.float32))  # (L, N)
        self.G_inf = torch.from_numpy(scheme.later(TAU, length).matrix.T.astype(np.float32))  # (M + L, N)
        self.even = self.psi(torch.from_numpy(scheme.old_positions(TAU).astype(np.float32)))  # (M, N)
        self.edges = torch.linspace(0, 1, BINS + 1)

    def psi(self, t: torch.Tensor) -> torch.Tensor:
        z = (t[:, None] - self.mu) / self.sigma
        return torch.exp(-0.5 * z**2) / (self.sigma * math.sqrt(2 * math.pi))

    def fit(self, x: torch.Tensor) -> torch.Tensor:
        return self.G.T @ x

    def update(self, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.G_inf.T @ torch.cat([self.even @ B, x])

    def sticky(self, B: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(mean.reshape(-1, 1), variance.reshape(-1, 1).sqrt(), validate_args=False)
        cdf = normal.cdf(self.edges)  # (heads q, D + 1)
        p = (cdf[:, 1:] - cdf[:, :-1]).sum(0)
        drawn = torch.multinomial(p / p.sum(), self.even.shape[0], replacement=True)
        t = self.edges[drawn].sort().values
        return self.G_inf.T @ torch.cat([self.psi(t) @ B, x])

    def attend(self, B: torch.Tensor, q: torch.Tensor, w: dict[str, torch.Tensor], focus: float) -> torch.Tensor:
        keys = (B @ w["W_K"].T).view(-1, HEADS, DIM).transpose(0, 1)  # (heads, N, d)
        values = (B @ w["W_V"].T).view(-1, HEADS, DIM).transpose(0, 1)
        scores = q @ keys.transpose(1, 2) / math.sqrt(DIM)  # (heads, q, N)
        mean = torch.sigmoid(scores @ w["w_mean"])
        variance = focus * torch.nn.functional.softplus(scores @ w["w_variance"]).clamp(min=1e-4)
        total = variance[..., None] + self.sigma**2
        seen = torch.exp(-0.5 * (mean[..., None] - self.mu) ** 2 / total) / torch.sqrt(2 * math.pi * total)
        z = (seen @ values).transpose(0, 1).reshape(-1, HEADS * DIM)
        return z @ w["W_O"].T


def ours_sticky(scheme: Scheme, B: Any, x: Any, mean: Any, variance: Any, rng: np.random.Generator) -> Any:
    mass = density.attention_mass(mean, variance, np.arange(BINS + 1) / BINS, "gaussian")
    return updated(scheme, B, x, TAU, resample(mass, scheme.looks(TAU), rng))


def ours_attend(scheme: Scheme, B: Any, q: Any, w: dict[str, Any], focus: float, xp: Any) -> Any:
    """The same output, without making keys or scores."""
    W_K = w["W_K"].reshape(HEADS, DIM, E)
    (mean,), (variance,) = affine(q[None], B[None], W_K, w["w_mean"], w["w_variance"], 1e-4)  # (heads, q)
    variance = focus * variance
    few = fewer_places(scheme.basis, variance, "gaussian", HEADS * q.shape[1])
    values = ((B if few is None else few.blurred(B)) @ w["W_V"].T).reshape(-1, HEADS, DIM)
    if few:  # as many columns as a product runs at full speed with, or fewer: all heads at once
        z = list(few.seen(mean, variance) @ values.swapaxes(0, 1))
    else:
        basis = scheme.basis.beside(q)
        seen = (density.expected_basis(mean[h], variance[h], *basis, "gaussian") for h in range(HEADS))
        z = [psi @ values[:, h] for h, psi in enumerate(seen)]
    return xp.stack(z, 1).reshape(-1, HEADS * DIM) @ w["W_O"].T


def once(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taking turns, by the chosen statistic; each runs once beforehand."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            spent = once(function)
            if i:
                times[name].append(spent)
    return {name: STATISTICS[chosen](spent) for name, spent in times.items()}


def product(*shape: int) -> dict[str, Callable[[], Any]]:
    """A matrix product (a, b) @ (b, c) in both libraries."""
    a, b, c = shape
    left, right = np.ones((a, b), np.float32), np.ones((b, c), np.float32)
    first, second = torch.from_numpy(left), torch.from_numpy(right)
    return {"numpy": lambda: left @ right, "torch": lambda: first @ second}


def limits(n: int, length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of the arithmetic of the cheapest dense exact algorithm, in the faster library for each part."""
    q = length
    parts = {"NLe": (n, length, E), "NNe": (n, n, E), "DNe": (BINS, n, E), "NDe": (n, BINS, E)}
    parts |= {"values": (n, E, HEADS * DIM), "head": (q, n, DIM), "out": (q, HEADS * DIM, E)}
    functions = {(name, lib): run for name, shape in parts.items() for lib, run in product(*shape).items()}
    arguments = -torch.rand(HEADS * q * n) * 20
    functions[("exps", "torch")] = lambda: torch.exp(arguments)
    points = torch.randn(HEADS * q * (BINS + 1))
    functions[("erfs", "torch")] = lambda: torch.erf(points)
    spent = in_turns(functions, rounds)
    best = {name: min(ms for (part, _), ms in spent.items() if part == name) for name, _ in functions}
    return {
        "fit": best["NLe"],
        "update": best["NNe"] + best["NLe"],
        "sticky": best["erfs"] + best["DNe"] + best["NDe"] + best["NLe"],
        **dict.fromkeys(FOCUS, best["values"] + best["exps"] + HEADS * best["head"] + best["out"]),
    }


def measure(n: int, length: int, widths: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of every operation by every method, limits, errors against float64, and the cost of construction."""
    rng = np.random.default_rng(0)
    scheme = Scheme(_basis(n, widths), RIDGE, SAMPLES)
    B, x = rng.standard_normal((1, n, E), np.float32) / 50, rng.standard_normal((1, length, E), np.float32)
    q = rng.standard_normal((HEADS, length, DIM), np.float32)
    spent = in_turns(
        {"first": partial(_first_update, scheme, B, x), "next": partial(updated, scheme, B, x, TAU)}, rounds
    )
    construction = spent["first"] - spent["next"]
    again = once(lambda: scheme.recurrence(scheme.later(TAU, length), TAU))
    w = {name: rng.standard_normal((HEADS * DIM, E), np.float32) / math.sqrt(E) for name in ("W_K", "W_V")}
    w["W_O"] = rng.standard_normal((E, HEADS * DIM), np.float32) / math.sqrt(HEADS * DIM)
    w |= {name: rng.standard_normal(n, np.float32) / math.sqrt(n) for name in ("w_mean", "w_variance")}
    mean = rng.random((1, HEADS * length), np.float32)
    variance = (10 ** rng.uniform(-4, -1, mean.shape)).astype(np.float32)
    t = {name: torch.from_numpy(a) for name, a in {"B": B, "x": x, "q": q, "mean": mean, "variance": variance}.items()}
    tw = {name: torch.from_numpy(a) for name, a in w.items()}
    published = Published(scheme, length)
    operations: dict[str, dict[str, Callable[[], Any]]] = {
        "fit": {
            "published": lambda: published.fit(t["x"][0]),
            "numpy": lambda: fitted(scheme, x),
            "torch": lambda: fitted(scheme, t["x"]),
        },
        "update": {
            "published": lambda: published.update(t["B"][0], t["x"][0]),
            "numpy": lambda: updated(scheme, B, x, TAU),
            "torch": lambda: updated(scheme, t["B"], t["x"], TAU),
        },
        "sticky": {
            "published": lambda: published.sticky(t["B"][0], t["x"][0], t["mean"], t["variance"]),
            "numpy": lambda: ours_sticky(scheme, B, x, mean, variance, rng),
            "torch": lambda: ours_sticky(scheme, t["B"], t["x"], t["mean"], t["variance"], rng),
        },
    }
    operations |= {
        name: {
            "published": partial(published.attend, t["B"][0], t["q"], tw, focus),
            "numpy": partial(ours_attend, scheme, B[0], q, w, focus, np),
            "torch": partial(ours_attend, scheme, t["B"][0], t["q"], tw, focus, torch),
        }
        for name, focus in FOCUS.items()
    }
    errors = {name: _error(operations[name]["numpy"](), operations[name]["published"]().numpy()) for name in FOCUS}
    exact = scheme.later(TAU, length).matrix
    with_samples = np.concatenate([scheme.basis(scheme.old_positions(TAU)) @ B[0].astype(float), x[0].astype(float)])
    errors["update"] = _error(updated(scheme, B, x, TAU)[0], exact @ with_samples)
    errors["fit"] = _error(fitted(scheme, x)[0], scheme.first(length).matrix @ x[0].astype(float))
    flat = {(o, m): run for o, methods in operations.items() for m, run in methods.items()}
    spent = in_turns(flat, rounds)
    floor = limits(n, length, rounds)
    table = {o: {m: spent[o, m] for m in methods} | {"limit": floor[o]} for o, methods in operations.items()}
    return {
        "N": n,
        "L": length,
        "widths": widths,
        "ms": table,
        "errors": errors,
        "construction_ms": construction,
        "construction_again_ms": again,
    }


def gibbs(rounds: int, n: int = 256, q: int = 256) -> dict[str, float]:
    """The Gibbs density on n bins: a softmax over slots, beside a trapezoidal rule on 1000 points as published."""
    rng = np.random.default_rng(0)
    basis = perdure.rectangular_basis(n)
    scores = rng.standard_normal((HEADS, q, n), np.float32)
    values = rng.standard_normal((HEADS, n, DIM), np.float32)
    t = torch.linspace(0, 1, 1000)
    psi = torch.from_numpy(basis(t.numpy()))  # (T, N)

    def trapezoid() -> Any:
        energies = torch.from_numpy(scores) @ psi.T  # (heads, q, T)
        powers = torch.exp(energies - energies.amax(-1, keepdim=True))
        p = powers / torch.trapz(powers, t)[..., None]
        v = psi @ torch.from_numpy(values)  # (heads, T, d)
        return torch.trapz(p[..., None] * v[:, None], t, dim=-2)

    def ours() -> Any:
        return gibbs_shares(scores, basis) @ values

    difference = _error(ours(), trapezoid().numpy())
    return in_turns({"published": trapezoid, "ours": ours}, max(rounds // 3, 3)) | {"difference": difference}


def drift(writes: int) -> dict[str, float]:
    """Float32 beside float64 after many writes, and the largest norm on the way."""
    rng = np.random.default_rng(0)
    exact, rounded = (
        perdure.ContinuousMemory(1, 8, 64, dtype=d, samples=128, sticky=False) for d in ("float64", "float32")
    )
    largest = 0.0
    for _ in range(writes):
        x = rng.standard_normal((1, 16, 8))
        exact.write(x)
        rounded.write(x)
        largest = max(largest, float(np.abs(exact.signal.coefficients).max()))
    error = _error(rounded.signal.coefficients, exact.signal.coefficients)
    return {"writes": writes, "error": error, "largest_coefficient": largest}


def stream(n: int) -> dict[str, float]:
    """A stream of every length from 1 to 512: milliseconds a write, and bytes that the cache holds in the end."""
    ridge.CACHE.clear()
    memory = perdure.ContinuousMemory(1, 64, n, sticky=False)
    rng = np.random.default_rng(0)
    segments = [rng.standard_normal((1, k, 64), np.float32) for k in range(1, 513)]
    spent = [once(partial(memory.write, x)) for x in segments]
    return {"median_ms": statistics.median(spent), "cache_bytes": ridge.CACHE.nbytes, "limit_bytes": ridge.CACHE_BYTES}


def _first_update(scheme: Scheme, B: np.ndarray, x: np.ndarray) -> None:
    ridge.CACHE.clear()
    updated(scheme, B, x, TAU)


def _basis(n: int, widths: str) -> Basis:
    if WIDTHS[widths] is None:
        return perdure.gaussian_basis(n)
    each = np.array(WIDTHS[widths])  # built directly: at small N the published widths leave holes
    return Basis(np.repeat(np.linspace(0, 1, n // each.size), each.size), np.tile(each, n // each.size))


def _error(got: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


def show(result: dict[str, Any]) -> None:
    print(
        f"\nN={result['N']} L={result['L']} widths {result['widths']}; construction "
        f"{result['construction_ms']:.1f} ms, again {result['construction_again_ms']:.3f} ms"
    )
    print(f"{'':8}{'published':>11}{'numpy':>9}{'torch':>9}{'limit':>9}   published/ours  ours/limit  error")
    for operation, ms in result["ms"].items():
        ours = min(ms["numpy"], ms["torch"])
        error = result["errors"].get(operation)
        print(
            f"{operation:8}{ms['published']:11.2f}{ms['numpy']:9.2f}{ms['torch']:9.2f}{ms['limit']:9.2f}"
            f"{ms['published'] / ours:17.2f}{ours / ms['limit']:12.2f}  {'' if error is None else f'{error:.0e}'}"
        )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of every operation at every shape, as multiples of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(16, 3.4), sharey=True, layout="constrained")
    labels = [f"{r['N']}/{r['L']} {r['widths']}" for r in results]
    for axis, operation in zip(axes, results[0]["ms"], strict=True):
        for i, method in enumerate(("published", "torch", "numpy")):
            heights = [r["ms"][operation][method] / r["ms"][operation]["limit"] for r in results]
            axis.bar(np.arange(len(results)) + 0.27 * (i - 1), heights, 0.26, label=method)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=operation, xticks=range(len(results)), xticklabels=labels)
        axis.tick_params(axis="x", labelsize=7, rotation=60)
    axes[0].set_ylabel("time over the dense limit")
    axes[0].legend(title="by")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continuous memory beside the published algorithm.")
    parser.add_argument(
        "--shapes", default="128/512,512/512,512/1024,1024/1024", help="N/L, comma-separated (%(default)s)"
    )
    parser.add_argument("--widths", default="published,scaled")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--writes", type=int, default=10_000, help="consolidations whose drift is measured; 0 for none")
    parser.add_argument("--statistic", choices=STATISTICS, default=chosen, help="best: on a busy machine")
    options = parser.parse_args()
    globals()["chosen"] = options.statistic
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with threadpool_limits(1):
        print(f"float32, one thread, batch 1, e={E}, {HEADS} heads of {DIM}, M={SAMPLES}; milliseconds, {chosen}")
        results = []
        for widths in options.widths.split(","):
            for shape in options.shapes.split(","):
                n, length = map(int, shape.split("/"))
                results.append(measure(n, length, widths, options.rounds))
                show(results[-1])
        whole: dict[str, Any] = {"machine": machine(), "statistic": chosen, "results": results}
        whole["gibbs"] = gibbs(options.rounds)
        print(f"\nGibbs density: published {whole['gibbs']['published']:.1f} ms, ours {whole['gibbs']['ours']:.2f} ms")
        whole["stream"] = stream(512)
        print(f"every length from 1 to 512: {whole['stream']}")
        if options.writes:
            whole["drift"] = drift(options.writes)
            print(f"drift: {whole['drift']}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "continuous.json").write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    draw(results, RESULTS / "continuous.png")


if __name__ == "__main__":
    main()
