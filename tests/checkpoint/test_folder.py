import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from efficientllava.checkpoint import folder as store
from efficientllava.checkpoint.export import model_card, round_weights, save, usage, write
from efficientllava.checkpoint.hub import LICENSES, about, folder_digest
from efficientllava.data.prompts import Prompts
from efficientllava.runtime.content import Memo
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.places import PROVENANCE
from experiments.speed.rows import peak_memory

from ..runs import ROOT, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture(scope="module")
def loaded(folder):
    return store.load(str(folder))


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


def test_half_precision_weights_are_computed_in_fp32_on_a_cpu_and_stored_as_they_were(loaded, folder, tmp_path):
    assert loaded.storage == torch.float16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    copy = save(loaded, tmp_path / "copy")
    before, after = load_file(folder / "model.safetensors"), load_file(copy / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.float16 and torch.equal(before[name], after[name]) for name in before)
    config = json.loads((copy / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert not [
        node for node in config.values() if isinstance(node, dict) and node.get("dtype", "float16") != "float16"
    ]
    again = store.load(str(copy))
    assert again.storage == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_named_type_is_computed_in(folder, name, expected):
    assert {p.dtype for p in store.load(str(folder), name).model.parameters()} == {expected}


def test_stock_transformers_loads_what_was_saved(loaded, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    copy = save(loaded, tmp_path / "copy")
    model = AutoModelForImageTextToText.from_pretrained(copy, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(copy)
    assert processor.tokenizer.get_vocab() == loaded.processor.tokenizer.get_vocab()
    assert processor.chat_template == loaded.processor.chat_template
    ids = torch.tensor([[2, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(loaded, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    save(loaded, target)
    (target / "model-00009-of-00009.safetensors").write_text("")
    (target / "additional_chat_templates").mkdir()
    save(loaded, target)
    assert not list(target.glob("*00009*")) and not (target / "additional_chat_templates").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_saving_loses_nothing_that_is_no_checkpoint(loaded, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, "."):
        with pytest.raises(UserError, match=r"holds thesis\.txt, which would be lost; give a folder of its own"):
            save(loaded, folder)
    made = save(loaded, "made")
    (made / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes\.txt, which would be lost"):
        save(loaded, made)
    (made / "gguf").mkdir()
    with pytest.raises(UserError, match="holds gguf, which would be lost"):
        save(loaded, made)
    assert (tmp_path / "thesis.txt").read_text() == "mine" and (made / "gguf").is_dir()


def test_digest_follows_content_and_not_place(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert folder_digest(copy) == folder_digest(folder)
    (copy / "notes.txt").write_text("read me")
    (copy / PROVENANCE).write_text("{}")
    assert folder_digest(copy) == folder_digest(folder)
    state = load_file(copy / "model.safetensors")
    last = sorted(state)[-1]
    state[last].view(-1)[-1] += 1
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert folder_digest(copy) != folder_digest(folder)
    shutil.copy(folder / "model.safetensors", copy / "model.safetensors")
    assert folder_digest(copy) == folder_digest(folder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert folder_digest(copy) != folder_digest(folder)


def test_whoever_loads_weights_that_were_changed_behind_their_provenance_is_told(loaded, tmp_path, caplog):
    (tmp_path / "copy").mkdir()
    write(loaded, tmp_path / "copy", memo=Memo())
    assert store.load(tmp_path / "copy").digest and not caplog.records
    file = tmp_path / "copy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert store.load(tmp_path / "copy").digest
    assert "model.safetensors has changed since it was written" in caplog.text and len(caplog.records) == 1


def test_rounding_makes_memory_equal_to_what_is_saved(folder, tmp_path):
    checkpoint = store.load(str(folder))
    for parameter in checkpoint.model.parameters():
        parameter.data.mul_(1.0001)
    round_weights(checkpoint.model, checkpoint.storage)
    again = store.load(str(save(checkpoint, tmp_path / "copy")))
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, tmp_path, value):
    copy = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.1.mlp.down_proj.weight"))
    state[name][-1, -1] = value
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    told = rf"^model\.path={copy}: tensor \S*layers\.1\.mlp\.down_proj\.weight: not finite, 1 (NaN|infinite) of "
    with pytest.raises(UserError, match=told):
        store.load(copy)


def test_weights_that_the_storage_type_cannot_hold_are_refused_by_name(folder):
    model = store.load(folder).model.float()
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"^tensor lm_head\.weight, stored as float16: not finite, 1 infinite"):
        round_weights(model, torch.float16)


def test_provenance_composes_over_two_prunings(loaded):
    assert loaded.original_layers == [0, 1]
    assert loaded.base["digest"] == loaded.digest
    five = store.Checkpoint(
        loaded.model, loaded.processor, "org/base", torch.float16, "d", {"original_layers": [*range(5)]}
    )
    first = five.after(loaded.model, {"stage": "prune"}, [0, 2, 3, 4])
    second = first.after(loaded.model, {"stage": "recover"})
    third = second.after(loaded.model, {"stage": "prune"}, [0, 1, 3])
    assert first.original_layers == [0, 2, 3, 4]
    assert second.original_layers == [0, 2, 3, 4]
    assert third.original_layers == [0, 2, 4]
    assert third.base == {"path": "org/base", "digest": "d"}
    assert [step["stage"] for step in third.provenance["history"]] == ["prune", "recover", "prune"]
    assert five.provenance == {"original_layers": [0, 1, 2, 3, 4]}


def test_the_base_is_found_again_from_another_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert store.load(folder.name).base["path"] == str(folder.resolve())


def test_the_model_card_is_read_by_hubs(loaded, tmp_path):
    import yaml

    pruned = loaded.after(loaded.model, {"stage": "prune", "achieved": 0.3}, [0, 1])
    text = (save(pruned, tmp_path / "copy", {"samples": 8}) / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "transformers"
    assert meta["pipeline_tag"] == "image-text-to-text"
    assert "pruned" in meta["tags"]
    assert '"achieved": 0.3' in body
    assert "samples: 8" in body
    assert "import efficientllava" not in body


@pytest.mark.parametrize("base", list(LICENSES))
def test_the_card_names_base_and_licence(tmp_path, base):
    import yaml

    card = model_card({"base": {"path": base, **about(tmp_path, base)}, "original_layers": [0]}, True, {})
    meta = yaml.safe_load(card.split("---\n")[1])
    assert (meta["base_model"], meta["license"]) == (base, LICENSES[base])
    assert usage("<this folder>", True) in card
    assert "import efficientllava" in card


def front_of(text):
    import yaml

    return yaml.safe_load(text.split("---\n")[1])


APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
LICENCES = [
    ({"README.md": "---\nlicense: cc-by-nc-4.0\nmodel_name: Ours 2B\n---\n# Title"}, ("cc-by-nc-4.0", None, "Ours 2B")),
    ({"README.md": "---\nlicense: other\nlicense_name: qwen\n---\n"}, ("other", "qwen", "mine")),
    ({"README.md": "no front matter", "LICENSE": APACHE}, ("apache-2.0", None, "mine")),
    ({"README.md": "---\n[broken: {\n---\n", "LICENSE.txt": "MIT\nPermission is hereby granted, free of\ncharge,"},
     ("mit", None, "mine")),
    ({"LICENCE.md": "The Secret Licence\nAsk us."}, ("other", "The Secret Licence", "mine")),
    ({}, (None, None, "mine")),
]  # fmt: skip


@pytest.mark.parametrize(("files", "told"), LICENCES)
def test_the_card_carries_the_name_and_the_licence_of_the_base_and_no_path(folder, tmp_path, files, told):
    mine = shutil.copytree(folder, tmp_path / "mine")
    for name, text in files.items():
        (mine / name).write_text(text)
    loaded = store.load(mine)
    first = save(loaded.after(loaded.model, {"stage": "prune"}, [0, 1]), tmp_path / "first")
    shutil.rmtree(mine)
    again = store.load(first)
    second = save(again.after(again.model, {"stage": "prune"}, [0, 1]), tmp_path / "second")
    for made in (first, second):
        text = (made / "README.md").read_text()
        front = front_of(text)
        assert (front.get("license"), front.get("license_name")) == told[:2]
        assert f"# A smaller {told[2]}\n" in text and str(tmp_path) not in text and "base_model" not in front


def test_a_shipped_model_has_the_licence_of_this_package():
    card = model_card({"base": store.load("builtin:tiny_llava").base, "original_layers": [0]}, True, {})
    assert front_of(card)["license"] == "apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "# A smaller tiny_llava\n" in card and "builtin" not in card


def test_a_folder_of_the_hub_s_cache_has_its_hub_id(tmp_path):
    path = "/home/me/.cache/huggingface/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0123abcd"
    base = {"path": path, **about(tmp_path, path)}
    front = front_of(model_card({"base": base, "original_layers": [0]}, False, {}))
    assert (front["base_model"], front["license"]) == ("llava-hf/llava-1.5-7b-hf", "llama2")


def test_the_lines_of_the_card_load_the_model(loaded, tmp_path):
    copy = save(loaded, tmp_path / "copy")
    scope = {}
    exec(usage(str(copy), False), scope)
    assert sum(p.numel() for p in scope["model"].parameters()) == sum(p.numel() for p in loaded.model.parameters())
    assert scope["processor"].tokenizer.vocab_size > 0


def fails(path, *parts):
    with pytest.raises(UserError) as error:
        store.load(str(path))
    line = str(error.value)
    assert line.startswith(f"model.path={path}: ")
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    assert error.value.exit_code == 2


def test_a_missing_folder(tmp_path):
    fails(tmp_path / "none", "no such folder", "hub id")
    fails("builtin:nothing", "no such folder")
    fails("word", "no such folder")


def test_a_folder_without_config_or_weights(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    fails(broken, "no *.safetensors", "only safetensors")
    (broken / "config.json").unlink()
    fails(broken, "no config.json", "save_pretrained")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "unheard-of"}', "{}"])
def test_a_config_that_cannot_be_read(broken, text):
    (broken / "config.json").write_text(text)
    fails(broken, "config.json")


def test_weights_that_do_not_fit(broken):
    file = broken / "model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith("down_proj.weight"))
    save_file({n: t for n, t in state.items() if n != name}, file, {"format": "pt"})
    fails(broken, "missing_keys", "down_proj", "get the complete folder")
    save_file({**state, "extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    fails(broken, "unexpected_keys", "extra.weight")
    save_file({**state, name: state[name][:, :-1].contiguous()}, file, {"format": "pt"})
    fails(broken, "down_proj")


@pytest.mark.parametrize("keep", [0, 5, 2000, -100])
def test_truncated_weights(broken, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(broken, "model.safetensors: truncated")


def test_an_unsupported_decoder(broken):
    from transformers import GPT2Config

    config = json.loads((broken / "config.json").read_text())
    config["text_config"] = GPT2Config(n_layer=1).to_dict()
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gpt2"):
        store.load(str(broken))


def test_a_model_that_sees_nothing(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    fails(tmp_path, "takes no images")


def test_a_folder_without_processor(broken):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (broken / name).unlink()
    fails(broken, "processor cannot be loaded", "tokenizer")


BASE = {"path": "org/name", "digest": "0"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("[]", "list instead of an object"),
        (json.dumps({"base": BASE}), "original_layers is no list of numbers"),
        (json.dumps({"base": BASE, "original_layers": ["a", "b"]}), "original_layers is no list of numbers"),
        (json.dumps({"base": BASE, "original_layers": [-1, 0]}), "original_layers is no list of numbers"),
        (json.dumps({"base": BASE, "original_layers": [1, 0]}), "original_layers do not rise"),
        (json.dumps({"base": BASE, "original_layers": [0, 1], "history": [3]}), "history is no list of objects"),
        (json.dumps({"base": BASE, "original_layers": [0]}), "it names 1 layers, the model has 2"),
        (json.dumps({"original_layers": [0, 1]}), "base has no path or no digest"),
        (json.dumps({"base": {**BASE, "digest": 1}, "original_layers": [0, 1]}), "base has no path or no digest"),
        (json.dumps({"base": BASE, "original_layers": [0, 1], "weights": []}), "weights is no object"),
    ],
)
def test_a_provenance_that_does_not_fit(broken, text, told):
    (broken / PROVENANCE).write_text(text)
    fails(broken, PROVENANCE, told, "mend it" if len(text) < 3 else "remove it")


@pytest.mark.parametrize("said", [True, 0])
def test_a_tokenizer_whose_limit_is_no_number(broken, said):
    change(broken, "tokenizer_config.json", model_max_length=said)
    fails(broken, "model_max_length")


def shards(folder):
    """Two files of weights with an index; returns their names, the index's map, and its writer."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    keys = sorted(weights)
    parts = [keys[:9], keys[9:]]
    for name, part in zip(names, parts, strict=True):
        save_file({key: weights[key] for key in part}, folder / name, {"format": "pt"})
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}

    def write(text=None):
        content = json.dumps({"metadata": {}, "weight_map": places}) if text is None else text
        (folder / "model.safetensors.index.json").write_text(content)

    return names, places, write


def test_a_shard_outside_of_the_folder_is_refused(broken):
    """No digest of the folder would see it."""
    names, places, write = shards(broken)
    (broken / "sub").mkdir()
    for place, target in (("../other.safetensors", broken.parent), ("sub/other.safetensors", broken / "sub")):
        (target / "other.safetensors").write_bytes((broken / names[0]).read_bytes())
        places.update({key: place for key, name in places.items() if name != names[1]})
        write()
        fails(broken, "index.json: must name files beside it")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "recursion"),
        ('{"weight_map": {}}', "must name files beside it"),
        ('{"weight_map": {"a": "."}}', "must name files beside it"),
        ('{"weight_map": {"a": 3, "b": 4}}', "must name files beside it"),
        ("{}", "cannot be read (KeyError: 'weight_map')"),
    ],
)
def test_an_index_that_leads_nowhere(broken, text, told):
    shards(broken)[2](text)
    fails(broken, "model.safetensors.index.json", told)


def test_a_tensor_in_two_shards_is_refused(broken):
    names, places, write = shards(broken)
    write()
    assert store.load(str(broken))
    second = load_file(broken / names[1])
    key = next(key for key, name in places.items() if name == names[0])
    save_file({**second, key: load_file(broken / names[0])[key] * 0}, broken / names[1], {"format": "pt"})
    fails(broken, f"tensor {key} is in {names[0]} and in {names[1]}")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_type_that_weights_would_be_rounded_to_is_refused(broken, dtype):
    change(broken, "config.json", dtype=dtype)
    fails(broken, f"dtype={dtype}: must be float32, float16, bfloat16")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"])
def test_a_byte_order_mark_is_named(broken, name):
    (broken / name).write_bytes(b"\xef\xbb\xbf" + (broken / name).read_bytes())
    fails(broken, f"{name} cannot be read: it begins with a byte-order mark; save it as UTF-8 without one")


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('no such role') }}", "{{ x.y.z }}"])
def test_a_chat_template_that_cannot_be_rendered(broken, template):
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"^chat template: cannot be rendered \(.+\); mend chat_template\.jinja$"):
        Prompts(store.load(str(broken)).processor)


def test_a_hub_id_without_network(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    fails("org/name", "cannot be fetched", "Name or service not known", "give a folder")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_leaves_what_was_there(loaded, tmp_path, monkeypatch, error):
    target = save(loaded, tmp_path / "copy")
    before = sorted(p.name for p in target.iterdir())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loaded.processor, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"copy: the disk is full; free some space or set paths\.output_dir"):
        save(loaded, target)
    assert sorted(p.name for p in target.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_another_failure_while_saving_leaves_nothing(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded.processor, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(loaded, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_saving_in_another_type_holds_no_second_copy(tmp_path):
    checkpoint = store.load("builtin:tiny_llava")
    checkpoint.storage = torch.float16
    before = {name: tensor.half().float() for name, tensor in checkpoint.model.state_dict().items()}
    largest = max(tensor.nbytes for tensor in checkpoint.model.state_dict().values())
    weights = list(checkpoint.model.parameters())

    def prepare():
        for weight in weights:
            weight.data = weight.data.clone()

    above = peak_memory(prepare, lambda _: save(checkpoint, tmp_path / "half"))
    assert above < 2 * largest < sum(weight.nbytes for weight in weights) / 4
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    (file,) = (tmp_path / "half").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(("said", "limit"), [(10**30, 512), (100, 100)])
def test_prompts_end_where_the_decoder_or_its_tokenizer_does(broken, said, limit):
    file = broken / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": said}))
    assert store.load(str(broken)).processor.tokenizer.model_max_length == limit


def change(folder, name="config.json", **fields):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **fields}))


def test_an_adapter_is_no_model(tmp_path, broken):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    fails(adapter, "is an adapter (LoRA of org/base)", "merge_and_unload", "give that folder")
    (adapter / "adapter_config.json").unlink()
    fails(adapter, "is an adapter (LoRA), not a whole model")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (broken / name).write_text("{}")
        fails(broken, f"holds an adapter, {name}, beside full weights", "adapter_*")
        (broken / name).unlink()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("place", [None, "text_config"])
def test_quantized_weights_are_refused(broken, method, place):
    found = {"quantization_config": {"quant_method": method}}
    content = json.loads((broken / "config.json").read_text())
    change(broken, **({place: {**content[place], **found}} if place else found))
    fails(
        broken,
        f"its weights are quantized ({method})",
        "cannot be pruned: give the checkpoint that they were made from",
    )


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_a_few_bits_are_refused_whatever_the_configuration_says(broken, kind):
    state = load_file(broken / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file({**state, name: state[name].to(kind)}, broken / "model.safetensors", {"format": "pt"})
    fails(broken, f"its weights are quantized ({name}: ", "cannot be pruned")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf{}", "byte-order mark; save it as UTF-8 without one"),
        (b"{} {}", "Extra data"),
        (b"[]", "list instead of an object"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe{", "can't decode"),
        (b"", "Expecting value"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named(broken, name, content, told):
    (broken / name).write_bytes(content)
    fails(broken, f"{name} cannot be read", told, "mend it")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_exports_follow_the_umask(loaded, tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save(loaded, tmp_path / "copy")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {oct(0o666 & ~umask)}
    assert not (folder / ".umask").exists()
