"""Writes small Llama checkpoints to test with: Hugging Face folders, GGUF twins, the demo model.

Everything is reproducible from the seed. Host only: imports no jax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxserve.models.checkpoint import open_checkpoint, resolve, tokenizer_files

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "to be or not to be, that is the question: 2 + 2 = 4",
    "def main():\n    return 42\n",
    "naïve café — 日本語 🦙",
) * 8


def write_llama_folder(
    path: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    rope_theta: float = 10000.0,
    shards: int = 2,
    dtype: Literal["bfloat16", "float32"] = "float32",
    vocab: int = 320,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 128,
    max_position_embeddings: int = 256,
    scale: float = 0.5,
) -> Path:
    """Writes a random Llama as a Hugging Face folder to `path` and returns `path`.

    The folder is what the Hub has: config.json, generation_config.json, tokenizer.json (byte-level
    BPE of exactly `vocab` tokens; 0 to 2 are `SPECIAL_TOKENS`, 2 is the end), a ChatML template in
    tokenizer_config.json and `shards` safetensors files with an index (1: model.safetensors).
    Matrices are normal with deviation `scale` / sqrt(fan in), so that activations keep their size.
    """
    path.mkdir(parents=True, exist_ok=True)
    head_dim = hidden // heads if head_dim is None else head_dim
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope_scaling,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "vocab_size": vocab,
    }
    write_json(path / "config.json", config)
    write_json(
        path / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2},
    )
    write_tokenizer(path, vocab, max_position_embeddings)
    write_shards(path, llama_tensors(config, seed=seed, scale=scale), shards)
    return path


def llama_tensors(
    config: dict[str, Any], *, seed: int, scale: float = 0.5
) -> dict[str, np.ndarray]:
    """Returns random parameters of a Llama by Hugging Face name, in the config's torch_dtype."""
    rng = np.random.default_rng(seed)
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm": (hidden,),
            prefix + "self_attn.q_proj": (queries, hidden),
            prefix + "self_attn.k_proj": (keys, hidden),
            prefix + "self_attn.v_proj": (keys, hidden),
            prefix + "self_attn.o_proj": (hidden, queries),
            prefix + "post_attention_layernorm": (hidden,),
            prefix + "mlp.gate_proj": (ffn, hidden),
            prefix + "mlp.up_proj": (ffn, hidden),
            prefix + "mlp.down_proj": (hidden, ffn),
        }
    shapes["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[config["torch_dtype"]]
    tensors = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape, np.float32)
        # Norms lie around 1, so that a weight left at its initial 1 shows.
        value = 1 + 0.1 * noise if len(shape) == 1 else noise * (scale / shape[1] ** 0.5)
        tensors[name + ".weight"] = value.astype(dtype)
    return tensors


def write_shards(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Writes tensors as model.safetensors, or as several shards and their index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        part = {str(name): tensors[str(name)] for name in names}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file as the Hub's are written."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(path: Path, vocab: int, max_length: int) -> None:
    """Writes a byte-level BPE of exactly `vocab` tokens, and its configuration, to a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # The corpus yields few merges; a larger vocabulary is filled up with words that never occur.
    missing = vocab - tokenizer.get_vocab_size()
    assert missing >= 0, f"{vocab=} must be at least {tokenizer.get_vocab_size()}"
    tokenizer.add_tokens([f"<|unused_{number}|>" for number in range(missing)])
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {
            "bos_token": SPECIAL_TOKENS[0],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL_TOKENS[2],
            "model_max_length": max_length,
            "pad_token": SPECIAL_TOKENS[2],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def demo_as_hf_folder(path: Path) -> Path:
    """Writes the demo GGUF, dequantised to float32, as a Hugging Face folder to `path`.

    Returns `path`. `transformers.LlamaForCausalLM.from_pretrained(path, dtype="float32")` and
    `AutoTokenizer.from_pretrained(path)` load it: the reference for the demo model (538 MB).
    """
    source = resolve("demo")
    path.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(source) as checkpoint:
        tensors = {
            name: checkpoint.read(name).astype(np.float32, copy=False) for name in checkpoint.names
        }
        write_json(path / "config.json", {**checkpoint.config, "torch_dtype": "float32"})
        write_json(path / "generation_config.json", checkpoint.generation_config)
    write_shards(path, tensors, 1)
    files = tokenizer_files(source)
    (path / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    write_json(
        path / "tokenizer_config.json",
        {
            "bos_token": files.bos_token,
            "chat_template": files.chat_template,
            "clean_up_tokenization_spaces": False,
            "eos_token": files.eos_token,
            "model_max_length": files.model_max_length,
            "pad_token": files.pad_token,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": files.unk_token,
        },
    )
    return path


def write_llama_gguf(path: Path, folder: Path, *, kind: Literal["F32", "Q8_0"] = "F32") -> Path:
    """Writes the GGUF twin of a folder of `write_llama_folder` to `path` and returns `path`.

    As llama.cpp's converter does: rows of q and k interleaved, `rope_scaling` of type llama3 as
    rope_freqs.weight, of type linear as metadata. "Q8_0" quantises the matrices, not the norms.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    add_byte_level_tokenizer(writer, folder)
    for name, tensor in sorted(folder_tensors(folder).items()):
        writer_name = _gguf_name(name)
        values = tensor.astype(np.float32)
        if "attn_q" in writer_name:
            values = _interleave(values, config["num_attention_heads"])
        if "attn_k" in writer_name:
            values = _interleave(values, config["num_key_value_heads"])
        if kind == "Q8_0" and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(writer_name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(writer_name, values)
    finish_gguf(writer)
    return path


def write_spm_gguf(
    path: Path, *, add_bos: bool | None = None, add_eos: bool = False, space_prefix: bool = True
) -> Path:
    """Writes a tensorless GGUF with a small sentencepiece tokenizer to `path`; returns `path`.

    Tokens: <unk>, <s>, </s>, 256 bytes, pieces (scores fall with the merge's rank), the control
    token [INST] and the user-defined token <tool>.
    """
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = sorted(pieces.get_vocab(), key=pieces.get_vocab().__getitem__)
    # As sentencepiece orders them: merged pieces by rank, then single characters.
    learned.sort(key=lambda piece: len(piece) == 1)
    kinds = gguf.TokenType
    rows = [
        ("<unk>", 0.0, kinds.UNKNOWN),
        ("<s>", 0.0, kinds.CONTROL),
        ("</s>", 0.0, kinds.CONTROL),
    ]
    rows += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    rows += [(piece, -float(rank), kinds.NORMAL) for rank, piece in enumerate(learned)]
    rows += [("[INST]", -1000.0, kinds.CONTROL), ("<tool>", -1000.0, kinds.USER_DEFINED)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(space_prefix)
    writer.add_add_eos_token(add_eos)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    finish_gguf(writer)
    return path


def finish_gguf(writer: Any) -> None:
    """Writes out a gguf.GGUFWriter."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def folder_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a folder, read by the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """Returns the frequency divisors [head_dim / 2] f32 of a "llama3" rope_scaling."""
    scaling, half = config["rope_scaling"], config["head_dim"] // 2
    frequencies = config["rope_theta"] ** -(np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    # convert_hf_to_gguf.py, LlamaModel.permute
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    found: str = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return found


def add_byte_level_tokenizer(writer: Any, folder: Path) -> None:
    """Adds the tokenizer of `write_tokenizer` to a gguf.GGUFWriter."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = dict(tokenizer["model"]["vocab"])
    types = dict.fromkeys(vocab, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        vocab[added["content"]] = added["id"]
        types[added["content"]] = (
            gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        )
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([types[token] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
