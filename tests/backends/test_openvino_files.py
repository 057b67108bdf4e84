"""What the openvino backend writes, byte for byte, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.backends.quantized_folder import LINEARS, QuantizedFolder, random_llama, write_quantized
from toolchain.backends import openvino as backend
from toolchain.backends.openvino.rotary import inverse_frequencies
from toolchain.backends.openvino.runtime import settings
from toolchain.backends.openvino.weights import decode_fp8, repack_int4
from toolchain.checkpoint import Checkpoint, TensorInfo
from toolchain.errors import ArtifactError, PlanError
from toolchain.family import read_config
from toolchain.progress import Silent


def folder(tmp_path: Path, weights: str, **stored: object) -> QuantizedFolder:
    return write_quantized(random_llama(kv_heads=2), tmp_path / "quantized", weights, **stored)


def build(source: QuantizedFolder, out: Path) -> Path:
    backend.write(Checkpoint.open(source.path), out, Silent())
    return out


def constants(engine: Path) -> dict[str, tuple[str, tuple[int, ...], np.ndarray]]:
    """Name -> (element type, shape, bytes) of every constant, read with nothing but an XML parser."""
    data = np.fromfile(engine / "openvino_model.bin", np.uint8)
    found = {}
    for layer in ElementTree.parse(engine / "openvino_model.xml").iterfind("layers/layer[@type='Const']"):
        where = layer.find("data").attrib
        shape = tuple(int(size) for size in where["shape"].split(",") if size.strip())
        begin = int(where["offset"])
        found[layer.attrib["name"]] = (where["element_type"], shape, data[begin : begin + int(where["size"])])
    return found


@pytest.mark.parametrize("group", [64, 128])
def test_int4_codes_and_scales_are_those_of_the_checkpoint_bit_for_bit(tmp_path: Path, group: int) -> None:
    source = folder(tmp_path, "int4", group=group)
    found = constants(build(source, tmp_path / "engine"))
    checked = 0
    for name, packed in source.tensors.items():
        if not name.removesuffix(".weight").endswith(LINEARS):
            continue
        kind, shape, data = found[name]
        rows, columns = packed.shape[0] * 2, packed.shape[1]
        assert (kind, shape) == ("i4", (rows, columns // group, group))
        codes = np.stack([data & 15, data >> 4], axis=1).reshape(rows, columns)
        assert np.array_equal(codes[0::2], packed.numpy() & 15)
        assert np.array_equal(codes[1::2], packed.numpy() >> 4)
        kind, shape, data = found[f"{name}_scale"]
        assert (kind, shape) == ("f32", (rows, columns // group, 1))
        assert data.tobytes() == source.tensors[f"{name}_scale"].numpy().tobytes()
        checked += 1
    assert checked == 14


def test_fp8_weights_are_the_checkpoint_s_numbers_and_give_its_codes_back(tmp_path: Path) -> None:
    source = folder(tmp_path, "fp8")
    found = constants(build(source, tmp_path / "engine"))
    checked = 0
    for name, codes in source.tensors.items():
        if codes.dtype != torch.float8_e4m3fn:
            continue
        kind, shape, data = found[name]
        assert (kind, shape) == ("f16", tuple(codes.shape))
        again = torch.from_numpy(data.view(np.float16).reshape(shape).copy()).to(torch.float8_e4m3fn)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        scale = found[f"{name}_scale"]
        assert scale[:2] == ("f32", ())
        assert scale[2].tobytes() == source.tensors[f"{name}_scale"].numpy().tobytes()
        checked += 1
    assert checked == 14


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "f32")])
def test_unquantized_tensors_keep_their_dtype_and_bytes(tmp_path: Path, dtype: str, kind: str) -> None:
    source = folder(tmp_path, "none", dtype=dtype)
    found = constants(build(source, tmp_path / "engine"))
    for name, tensor in source.tensors.items():
        assert found[name][:2] == (kind, tuple(tensor.shape))
        assert found[name][2].tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_large_constants_are_aligned_and_each_is_stored_once(tmp_path: Path) -> None:
    model = random_llama(kv_heads=2, tied=True)
    source = write_quantized(model, tmp_path / "quantized", "int4")
    engine = build(source, tmp_path / "engine")
    places = {name: int(layer["offset"]) for name, layer in _places(engine).items()}
    assert all(offset % 64 == 0 for offset in places.values())
    stored = sum(tensor.nbytes for tensor in source.tensors.values())
    assert stored < (engine / "openvino_model.bin").stat().st_size < stored + 16384


def _places(engine: Path) -> dict[str, dict[str, str]]:
    layers = ElementTree.parse(engine / "openvino_model.xml").iterfind("layers/layer[@type='Const']")
    return {layer.attrib["name"]: layer.find("data").attrib for layer in layers}


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path, "int4")
    first, second = build(source, tmp_path / "one"), build(source, tmp_path / "two")
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_configuration_and_side_files_travel_with_the_engine(tmp_path: Path) -> None:
    source = folder(tmp_path, "int4")
    engine = build(source, tmp_path / "engine")
    for name in ("config.json", "generation_config.json"):
        assert (engine / name).read_bytes() == (source.path / name).read_bytes()


def test_repacking_moves_every_nibble_to_its_place() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (6, 10), dtype=np.uint8)
    by_output = codes[0::2] | codes[1::2] << 4
    by_input = codes[:, 0::2] | codes[:, 1::2] << 4
    assert np.array_equal(repack_int4(by_output), by_input)


def test_fp8_numbers_are_those_of_torch() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    numbers = decode_fp8(TensorInfo("w", "F8_E4M3", codes.shape, Path("f"), 0, codes.size), codes).view(np.float16)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float16).numpy()
    assert numbers.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, object]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        num_hidden_layers=1,
        vocab_size=8,
        intermediate_size=8,
        rope_parameters=rope,
    )
    expected = transformers.LlamaModel(config).rotary_emb.inv_freq.numpy()
    raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    ours = inverse_frequencies(read_config(raw, "config.json"))
    np.testing.assert_allclose(ours, expected, rtol=3e-7, atol=0)


def damage(source: QuantizedFolder, name: str, tensor: torch.Tensor) -> Path:
    file = source.path / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, {"format": "pt"})
    return file


def test_a_truncated_checkpoint_is_refused_by_the_file_s_name(tmp_path: Path) -> None:
    source = folder(tmp_path, "int4")
    file = source.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: truncated"):
        build(source, tmp_path / "engine")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_numbers_are_refused_by_the_file_s_name(tmp_path: Path, bad: float) -> None:
    source = folder(tmp_path, "int4")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    scales = source.tensors[name].clone()
    scales[3, 1] = bad
    file = damage(source, name, scales)
    with pytest.raises(ArtifactError) as caught:
        build(source, tmp_path / "engine")
    assert str(file) in caught.value.message
    assert name in caught.value.message


def test_fp8_codes_that_are_not_numbers_are_refused_by_the_file_s_name(tmp_path: Path) -> None:
    source = folder(tmp_path, "fp8")
    name = "model.layers.0.self_attn.o_proj.weight"
    codes = source.tensors[name].view(torch.uint8).clone()
    codes[5, 7] = 0xFF
    file = damage(source, name, codes.view(torch.float8_e4m3fn))
    with pytest.raises(ArtifactError) as caught:
        build(source, tmp_path / "engine")
    assert str(file) in caught.value.message
    assert name in caught.value.message


def test_groups_that_do_not_fill_the_rows_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path, "int4", group=128)
    stated = source.path / "hf_quant_config.json"
    stated.write_text(stated.read_text().replace("128", "120"))
    with pytest.raises(ArtifactError, match=r"256 columns, not 2 groups of 120"):
        build(source, tmp_path / "engine")


def test_a_cache_that_openvino_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="fp8"):
        settings(kv="fp8", cache_tokens=64, max_sequences=1, max_step_tokens=64)


BOUND_MIB = 96
_MEASURE = """
import sys
from pathlib import Path
import openvino
from toolchain.backends import openvino as backend
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent

def peak_mib():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) // 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
before = peak_mib()
backend.write(checkpoint, Path(sys.argv[2]), Silent())
print(peak_mib() - before)
"""


def test_building_takes_the_memory_of_one_tensor_not_of_the_model(tmp_path: Path) -> None:
    source = write_large_int4(tmp_path / "large")
    checkpoint = Checkpoint.open(source)
    assert checkpoint.nbytes > 3 * BOUND_MIB * 2**20
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(source), str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < BOUND_MIB


def write_large_int4(path: Path) -> Path:
    """Random codes in the layout, about 300 MB: 11 layers of hidden 2048."""
    layers, hidden, inner, vocabulary = 11, 2048, 5504, 1024
    path.mkdir()
    shapes = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (hidden, hidden)
    )
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {
        "model.embed_tokens.weight": torch.zeros(vocabulary, hidden, dtype=torch.float16),
        "lm_head.weight": torch.zeros(vocabulary, hidden, dtype=torch.float16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.float16),
    }
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
        for linear, (rows, columns) in shapes.items():
            name = f"model.layers.{layer}.{linear}"
            tensors[f"{name}.weight"] = torch.full((rows // 2, columns), 0x3C, dtype=torch.uint8)
            tensors[f"{name}.weight_scale"] = torch.ones(rows, columns // 64)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=vocabulary,
    )
    raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (path / "config.json").write_text(json.dumps(raw))
    scheme = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": False}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": scheme}))
    return path
