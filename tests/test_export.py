"""Export, certificate and the engine llamacpp: what is written, what is refused, and what llama.cpp makes of it."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from poetry_iter.core import UserError, read_json, root, write_json
from poetry_iter.engine import ModelSpec, Sampling, open_engine, open_renderer, spec_named, trained_with
from poetry_iter.engines.converter import to_gguf
from poetry_iter.engines.gguf import read_gguf, write_adapter_gguf, write_gguf
from poetry_iter.engines.llamacpp import QUANTS, fallbacks, quantize_gguf
from poetry_iter.engines.merging import merge_adapter
from poetry_iter.poems import load_poems
from poetry_iter.quality.quantization import compare_tokens
from poetry_iter.runs import Run
from poetry_iter.training import Training, train
from poetry_iter.use import export
from poetry_iter.use.export import LEAST, export_adapters, export_jobs, export_merged, held_out_examples, shipped_poems
from poetry_iter.workshop.session import exported_players

HOUSE = Path(__file__).resolve().parents[1]
writes = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed: pip install 'poetry_iter[gguf]'")
runs_gguf = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: pip install 'poetry_iter[llamacpp]'")


@pytest.fixture(scope="session")
def poems():
    return load_poems(root() / "data/tiny_poems.jsonl")[0]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, poems):
    """A run of the workshop with one checkpoint, a poet trained on four examples."""
    run, lm = Run(tmp_path_factory.mktemp("runs") / "small-export-0001"), open_engine(ModelSpec())
    write_json(run.path / "config.json", {"experiment": "workshop", "parameters": {}})
    examples = [lm.renderer.example("Rain on a roof.", p.title, p.content) for p in poems[:4]]
    done = train(lm, examples, run.path / "poet", Training(learning_rate=5e-3, batch_size=4, lora_rank=8))
    run.add_checkpoint({**done["checkpoint"], "name": "poet", "round": 0, "where": "poet", "use": True})
    return run


@pytest.fixture(scope="session")
def f16(tmp_path_factory):
    """The embedded model as a file of 16 bit."""
    return write_gguf(root() / "data/model", tmp_path_factory.mktemp("gguf") / "embedded-base-F16.gguf", facts={"task": "base"})


def nothing_left(folder: Path) -> bool:
    """No file, whole or half, hidden or not."""
    return not folder.exists() or not list(folder.iterdir())


# ------------------------------------------------------------------ what is written


@writes
def test_a_file_holds_what_our_prompts_need(f16):
    head, (render, context) = read_gguf(f16), open_renderer(ModelSpec())
    values = head.values
    assert values["tokenizer.ggml.bos_token_id"] == render.context("Rain.")[0] == render.chat([{"role": "user", "content": "x"}])[0]
    assert values["tokenizer.ggml.eos_token_id"] == render.end and values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.padding_token_id"] != render.end
    assert values["tokenizer.chat_template"] == (root() / "data/model/chat_template.jinja").read_text()
    assert values["qwen3.context_length"] == context and head.size == f16.stat().st_size and head.types["F16"] == 29


@writes
def test_the_merged_model_is_the_adapter_on_its_base(small_run, poems, tmp_path):
    adapter = str(small_run.path / "poet")
    merged = merge_adapter("data/model", adapter, tmp_path / "merged", "chat")
    example = [open_engine(ModelSpec()).renderer.example("Rain on a roof.", poems[0].title, poems[0].content)]
    base, trained, whole = (open_engine(s).token_losses(example)[0] for s in (ModelSpec(), ModelSpec(adapter=adapter), ModelSpec(name=str(merged))))
    assert np.abs(trained - whole).max() < 0.02 < np.abs(trained - base).max()
    assert read_json(merged / "config.json")["dtype"] == "float16"


def test_few_held_out_texts_are_not_enough(small_run, tmp_path):
    """Beside the rows that a run held out stand poems that it has not learned, until an interval says something."""
    run, render = Run(shutil.copytree(small_run.path, tmp_path / small_run.path.name)), open_renderer(ModelSpec())[0]
    (run.path / "poet_training").mkdir()
    learned, row = shipped_poems()[:5], {"messages": [{"role": "user", "content": "Rain."}, {"role": "assistant", "content": "It rains."}], "poems": ["held"]}
    (run.path / "poet_training/valid.jsonl").write_text(json.dumps(row) + "\n")
    (run.path / "poet_training/train.jsonl").write_text(json.dumps({**row, "poems": [p.id for p in learned]}) + "\n")
    found, source = held_out_examples(render, run, "poet")
    said = [render.decode(e.tokens) for e in found]
    assert len(found) == LEAST and "It rains." in said[0] and "and 15 poems that it has not learned" in source
    assert not any(p.content in text for p in learned for text in said)


@writes
def test_the_file_of_16_bit_without_llama_cpp(house, small_run):
    done = house.cli("export", str(small_run.path), "--quant", "F16", "--uncertified", "--out", "files")
    assert done.returncode == 0, done.stderr
    assert [f.name for f in (house.path / "files").iterdir()] == ["embedded-poet-F16.gguf"] and "not certified" in done.stdout
    made = read_gguf(house.path / "files/embedded-poet-F16.gguf").made_with
    assert made["task"] == "poet" and made["renderer"] == "chat" and made["base"] == "data/model" and made["run"] == small_run.name
    assert trained_with(spec_named(str(house.path / "files/embedded-poet-F16.gguf")))["step"] == made["step"]


@writes
def test_a_models_own_converter(tmp_path, monkeypatch):
    """An architecture that the small writer does not know goes through the script that is found; the head is completed after it."""
    strange = shutil.copytree(root() / "data/model", tmp_path / "strange")
    write_json(strange / "config.json", {**read_json(strange / "config.json"), "model_type": "llama"})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"architecture llama, which the small writer does not know, and llama\.cpp's converter is not here"):
        to_gguf(strange, tmp_path / "out.gguf")
    (tmp_path / "llama.cpp").mkdir()
    script = tmp_path / "llama.cpp/convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('this tokenizer is unknown')")
    with pytest.raises(UserError, match=r"convert_hf_to_gguf\.py failed: this tokenizer is unknown"):
        to_gguf(strange, tmp_path / "out.gguf")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HOUSE)!r})\nfrom poetry_iter.engines.gguf import write_gguf\n"
        f"write_gguf({str(root() / 'data/model')!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    )
    head = read_gguf(to_gguf(strange, tmp_path / "out.gguf", "base", {"task": "poet"}))
    assert head.values["tokenizer.ggml.eos_token_id"] == 0 and head.made_with == {"task": "poet"} and head.types["F16"] == 29
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llama.cpp", "out.gguf", "strange"]


# ------------------------------------------------------------------ what is refused


@writes
def test_faults_are_one_sentence(house, small_run, tmp_path):
    write_json(house.run("empty") / "config.json", {"experiment": "loop", "parameters": {}})
    other = shutil.copytree(small_run.path, house.run("other"))
    write_json(other / "poet/made_with.json", {**read_json(other / "poet/made_with.json"), "base_hash": "0123456789abcdef"})
    plain = ("--quant", "F16", "--uncertified")
    faults = {
        ("nowhere", *plain): "there is no folder outputs/nowhere",
        ("empty", *plain): "it has trained nothing yet",
        ("other", *plain): "made on the base model data/model (0123456789abcdef)",
        (str(small_run.path), "--quant", "Q2_K"): "choose one of Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16, or all",
        (str(small_run.path), "--checkpoint", "educator", *plain): "it has no checkpoint 'educator'; there are: poet",
        (str(small_run.path), "--poems", "none.jsonl", *plain): "none.jsonl: there is no such file",
        ("data/model", "--adapter", *plain): "has no adapter",
        ("data/model", "--examples", "0"): "--examples is 1 or more",
    }
    for args, said in faults.items():
        done = house.cli("export", *args, "--out", "files")
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, (args, done.stderr)
        assert nothing_left(house.path / "files"), args


@writes
def test_without_llama_cpp(house, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = house.cli("export", "data/model")
    assert done.returncode == 2 and "pip install 'poetry_iter[llamacpp]'" in done.stderr and "`--quant F16 --uncertified` still writes" in done.stderr
    done = house.cli("run", "workshop", "--run", "w", "-p", "export=Q4_K_M")
    assert done.returncode == 2 and "llama-cpp-python is not installed" in done.stderr and not house.run("w").exists()
    with pytest.raises(UserError, match=r"llama_cpp is not installed: pip install 'poetry_iter\[llamacpp\]'"):
        open_engine(ModelSpec(name="x.gguf", engine="llamacpp"))


@writes
def test_without_room(house, monkeypatch):
    full = shutil._ntuple_diskusage(2**40, 2**40, 4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    done = house.cli("export", "data/model", "--quant", "F16", "--uncertified", "--out", "files")
    assert done.returncode == 2 and "are free; nothing was written" in done.stderr and nothing_left(house.path / "files")
    with pytest.raises(UserError, match="bytes and 4,000,000 are free"):
        write_gguf(root() / "data/model", house.path / "x.gguf")
    assert not (house.path / "x.gguf").exists()


@writes
@pytest.mark.parametrize("size", [2_000_000, 8_450_000], ids=["merging", "converting"])
def test_a_disk_that_fills_up_while_it_writes(house, size):
    """The system refuses a file over a size: the merged model, or its GGUF file, which is a little larger."""
    limit = f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)\n"
    house.script.with_name("limited.py").write_text(limit + house.script.read_text())
    house.script = house.script.with_name("limited.py")
    done = house.cli("export", "data/model", "--quant", "F16", "--uncertified", "--out", "files")
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert nothing_left(house.path / "files")


@writes
def test_broken_files(f16, tmp_path, house):
    whole = f16.read_bytes()
    for name, data, said in (
        ("cut", whole[:1_000_000], "the file was cut off"),
        ("head", whole[:3000], "whose head is broken"),
        ("text", b"a poem", "not a GGUF file"),
        ("empty", b"", "not a GGUF file"),
        ("new", b"GGUF\x09\x00\x00\x00" + bytes(40), "GGUF of version 9"),
        ("lie", whole[:8] + b"\xff" * 16 + whole[24:], "whose head is broken"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(UserError, match=said):
            read_gguf(tmp_path / f"{name}.gguf")
        done = house.cli("write", "rain", "--model", str(tmp_path / f"{name}.gguf"))
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(UserError, match="a GGUF file needs engine: llamacpp"):
        ModelSpec(name="x.gguf")
    with pytest.raises(UserError, match="engine llamacpp runs a GGUF file"):
        ModelSpec(engine="llamacpp")


# ------------------------------------------------------------------ what llama.cpp makes of it


@runs_gguf
def test_the_engine_reads_as_the_model_does(f16, poems):
    full, lm = open_engine(ModelSpec()), open_engine(spec_named(str(f16)))
    assert compare_tokens(full.renderer, lm.renderer, shipped_poems())["differ"] == []
    examples = [full.renderer.example("Sea, wind and salt.", p.title, p.content) for p in poems[:4]]
    ours, theirs = full.token_losses(examples), lm.token_losses(examples)
    assert max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs)) < 0.02
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(theirs, lm.token_losses(examples, batch_size=1)))  # no loss moves with the batch
    prompts, greedy = [full.renderer.describe(p) for p in poems[:4]], Sampling(temperature=0, max_new_tokens=24)
    same = sum(a.tokens == b.tokens for (a,), (b,) in zip(*(m.sample(prompts, lm.renderer.end, 1, greedy) for m in (full, lm))))
    assert same >= 3
    with pytest.raises(UserError, match="does not train"):
        lm.train(examples, "x", None, 1)
    lm.close()


@runs_gguf
def test_samples(f16, poems):
    lm = open_engine(spec_named(str(f16)))
    prompts, end, sampling = [lm.renderer.describe(p) for p in poems[:5]], lm.renderer.end, Sampling(max_new_tokens=20)
    first, again = (lm.sample(prompts, end, 3, sampling, [1, 2, 3, 4, 5]) for _ in range(2))
    assert [[c.tokens for c in cs] for cs in first] == [[c.tokens for c in cs] for cs in again]
    assert all(len(cs) == 3 and len({tuple(c.tokens) for c in cs}) > 1 for cs in first)
    assert all(c.ended == ("stop" if c.tokens[-1] == end else "length") and len(c.tokens) <= 20 for cs in first for c in cs)
    crowded = lm.sample(prompts, end, 3, sampling, [1, 2, 3, 4, 5], rows=3)  # three rows at a time
    assert sum(a.tokens == b.tokens for x, y in zip(first, crowded) for a, b in zip(x, y)) >= 12
    heard: list[str] = []
    ((said,),) = lm.sample(prompts[:1], end, 1, sampling, [9], stream=heard.append)
    assert "".join(heard) == said.text

    def leave(piece):
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        lm.sample(prompts[:1], end, 1, sampling, [9], stream=leave)
    ((after,),) = lm.sample(prompts[:1], end, 1, sampling, [9])
    assert after.tokens == said.tokens
    for bad in ({"n": 0}, {"n": 300}):
        with pytest.raises(UserError, match="1 to 256"):
            lm.sample(prompts, end, **bad)
    with pytest.raises(UserError, match="longer than the context"):
        lm.sample([[1] * 2048], end)
    lm.close()


@runs_gguf
def test_echoed_log_probabilities_are_not_off_by_one(f16, poems):
    """llama-cpp-python's completion with echo leaves out the first token only where it is the file's BOS."""
    import llama_cpp

    render = open_engine(ModelSpec()).renderer
    example = render.example("Rain.", poems[0].title, poems[0].content)
    model = llama_cpp.Llama(str(f16), n_ctx=2048, logits_all=True, verbose=False)
    tokens = example.tokens[:-1]
    said = model.create_completion(render.decode(tokens), max_tokens=1, echo=True, logprobs=1, temperature=0)
    echoed = said["choices"][0]["logprobs"]["token_logprobs"]  # the first is None; a token like BOS is left out wherever it stands
    ours = -open_engine(ModelSpec()).token_losses([type(example)(tokens, [0] + [1] * (len(tokens) - 1))])[0]
    ours = [x for token, x in zip(tokens[1:], ours) if token != tokens[0]]
    assert len(echoed) == len(ours) and np.abs(np.array(echoed[1:], float) - ours[1:]).mean() < 0.01
    model.close()


@runs_gguf
def test_quantized_files(f16, tmp_path):
    sizes = {}
    for quant in QUANTS:
        path = quantize_gguf(f16, tmp_path / f"{quant}.gguf", quant)
        head = read_gguf(path)
        assert fallbacks(head, quant) == [] and head.made_with == {"task": "base"} and head.values["tokenizer.ggml.bos_token_id"] == 1
        sizes[quant] = path.stat().st_size
    assert list(sizes.values()) == sorted(sizes.values()) and sizes["F16"] > 2.9 * sizes["Q4_K_M"]
    with pytest.raises(UserError, match="there is none of that name"):
        quantize_gguf(f16, tmp_path / "x.gguf", "Q3_K_S")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f"{q}.gguf" for q in QUANTS)


@runs_gguf
def test_a_certificate_and_the_next_larger_file(small_run, tmp_path, monkeypatch):
    (job,) = export_jobs(str(small_run.path), most=6)
    done = export_merged(job, tmp_path / "all", "all")
    rows = {r["quant"]: r for r in done["certificate"]["rows"]}
    assert list(rows) == list(QUANTS) and done["certificate"]["checked"]["differ"] == []
    assert all(r["ratio_lo"] <= r["ratio"] <= r["ratio_hi"] and r["kl"] >= 0 for r in rows.values())
    assert rows["Q4_K_M"]["kl"] > rows["Q5_K_M"]["kl"] > rows["Q6_K"]["kl"] > rows["F16"]["kl"] and rows["F16"]["top"] > 0.97
    monkeypatch.setattr(export, "LINE", (rows["Q4_K_M"]["ratio"] + max(rows[q]["ratio"] for q in ("Q6_K", "Q8_0", "F16"))) / 2)
    passing = [q for q in QUANTS if rows[q]["ratio"] <= export.LINE]
    done = export_merged(job, tmp_path / "line")
    assert done["certificate"]["chosen"] == passing[0] != "Q4_K_M" and done["file"].name == f"embedded-poet-{passing[0]}.gguf"
    kept = json.loads((tmp_path / "line" / f"embedded-poet-{passing[0]}.certificate.json").read_text())
    assert kept["chosen"] == passing[0] and "Q4_K_M: perplexity is" in kept["why"]
    assert sorted(f.suffix for f in (tmp_path / "line").iterdir()) == [".gguf", ".html", ".json"]


@runs_gguf
def test_a_failing_export_exits_with_1(house, monkeypatch):
    monkeypatch.setattr(export, "LINE", 0.9)
    done = house.cli("export", "data/model", "--examples", "3", "--out", "files")
    assert done.returncode == 1 and "no file passes its certificate: base: the file of 16 bit: perplexity is" in done.stderr
    assert sorted(f.name for f in (house.path / "files").iterdir()) == ["embedded-base-Q4_K_M.failed.html", "embedded-base-Q4_K_M.failed.json"]


@runs_gguf
def test_adapters_share_a_base(small_run, f16, tmp_path):
    (job,) = export_jobs(str(small_run.path), most=4)
    (found,) = export_adapters([job], tmp_path / "shared", "Q8_0")
    assert found["certificate"]["chosen"] == "Q8_0" and found["file"].name == "embedded-base-Q8_0.gguf" and found["adapter"].name == "embedded-poet-adapter.gguf"
    shutil.copy(found["adapter"], tmp_path / "shared/embedded-educator-adapter.gguf")
    assert exported_players(tmp_path / "shared")[1] == spec_named(f"{found['file']}+{found['adapter']}")
    alone, adapted = open_engine(spec_named(str(found["file"]))), open_engine(spec_named(f"{found['file']}+{found['adapter']}"))
    assert adapted.file is alone.file and adapted.identity != alone.identity
    trained = open_engine(ModelSpec(adapter=str(small_run.path / "poet")))
    theirs, ours, base = (m.token_losses(job.examples[:1])[0] for m in (trained, adapted, alone))
    assert np.abs(theirs - ours).mean() < 0.1 < np.abs(theirs - base).mean()
    alone.close()
    assert len(adapted.token_losses(job.examples[:1])) == 1  # the base stays while one needs it
    adapted.close()
    other = write_gguf(root() / "data/model", tmp_path / "other.gguf", facts={"base_hash": "0" * 16})
    with pytest.raises(UserError, match=r"made on the base model data/model \(\w+\), not on other\.gguf \(0000"):
        open_engine(spec_named(f"{other}+{found['adapter']}"))
    with pytest.raises(UserError, match="made with the renderer 'chat'"):
        open_engine(ModelSpec(name=str(found["file"]), adapter=str(found["adapter"]), engine="llamacpp", renderer="thinking"))
    with pytest.raises(UserError, match="an adapter, where a model was expected"):
        open_engine(spec_named(str(found["adapter"])))
    with pytest.raises(UserError, match="a model, where an adapter was expected"):
        open_engine(spec_named(f"{f16}+{f16}"))


@runs_gguf
def test_a_session_on_files(house, f16):
    """By the files' names, or as what a run has exported."""
    made = house.run("w") / "export"
    made.mkdir(parents=True)
    for role in ("educator", "poet"):
        shutil.copy(f16, made / f"embedded-{role}-F16.gguf")
        (made / f"embedded-{role}-Q8_0.gguf").write_bytes(f16.read_bytes() + bytes(9))  # a larger one is not taken
    for how in (("--model", f"{f16},{f16}"), ("--run", "w/export")):
        done = house.cli("write", "a poem about rain", *how, "--tokens", "24", "--revisions", "0", "--out", "poem.json")
        assert done.returncode == 0, done.stderr
        poet = json.loads((house.path / "poem.json").read_text())["metadata"]["models"]["poet"]
        assert poet["engine"] == "llamacpp" and poet["name"] == str(made.resolve() / "embedded-poet-F16.gguf" if "--run" in how else f16)
    (made / "embedded-educator-F16.gguf").unlink()
    (made / "embedded-educator-Q8_0.gguf").unlink()
    done = house.cli("write", "a poem about rain", "--run", "w/export")
    assert done.returncode == 2 and "no file of the educator; there are: embedded-poet-F16.gguf" in done.stderr


@writes
def test_an_adapters_file_says_what_it_is(small_run, tmp_path):
    head = read_gguf(write_adapter_gguf(small_run.path / "poet", root() / "data/model", tmp_path / "a.gguf", "chat"))
    assert head.is_adapter and head.made_with["base"] == "data/model" and head.types == {"F32": 56} and head.values["adapter.lora.alpha"] == 32
