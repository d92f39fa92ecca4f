"""Draws the pictures of the page on continuous memory; Sphinx runs it, so that they always show what the code does."""

from pathlib import Path

import numpy as np

import perdure


def draw(folder: Path) -> None:
    """One PNG a function of perdure.plot, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    t = (np.arange(300) + 0.5) / 300
    samples = np.stack([np.sin(12 * t**2), np.cos(5 * t)], axis=-1) + 0.15 * rng.standard_normal((300, 2))
    fitted = perdure.fit(samples, perdure.gaussian_basis(64), ridge="gcv")

    memory, edges, wanted = perdure.ContinuousMemory(1, 8, 256, contraction=0.75, segment=256), np.arange(65) / 64, 300
    histograms = []
    for _ in range(12):  # a quarter of attention looks at token 300, wherever it is by then
        memory.write(rng.standard_normal((1, 256, 8)), attention=np.array(histograms[-1:]) if histograms else None)
        place = np.interp(wanted, memory.shown(edges)[0], edges)
        histograms.append(perdure.mass(np.array([place]), 1e-3, edges)[0] + 3 / 64)
    pictures = {
        "signal": perdure.plot.signal(fitted, samples),
        "attention": perdure.plot.attention(np.array(histograms)),
        "retained": perdure.plot.retained(memory),
        "error": perdure.plot.error(
            *(perdure.ContinuousMemory(1, 8, n, contraction=0.75, segment=256).report(features=8) for n in (64, 256)),
            names=["64 functions", "256 functions"],
        ),
    }
    for name, picture in pictures.items():
        picture.savefig(folder / f"continuous-{name}.png", dpi=110)


if __name__ == "__main__":
    draw(Path("pictures"))
