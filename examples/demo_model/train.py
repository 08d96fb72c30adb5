"""Trains the demo model on the text of ``generate.py`` and writes it as a GGUF file.

A small llama: RMSNorm, rotary positions on interleaved pairs (the layout that llama.cpp expects of
the ``llama`` architecture, so nothing has to be permuted), SwiGLU, tied embeddings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import words
from generate import END_OF_TEXT, IM_END, IM_START, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

Encoded = tuple[list[int], list[int]]

SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocab: int = 2048
    dim: int = 192
    layers: int = 4
    heads: int = 6
    hidden: int = 512
    context: int = 2048
    rope_base: float = 10_000.0
    epsilon: float = 1e-5


class Block(nn.Module):
    """One layer: attention and a gated feed-forward net, each with a norm before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attn_norm = nn.RMSNorm(shape.dim, eps=shape.epsilon)
        self.attn_q = nn.Linear(shape.dim, shape.dim, bias=False)
        self.attn_k = nn.Linear(shape.dim, shape.dim, bias=False)
        self.attn_v = nn.Linear(shape.dim, shape.dim, bias=False)
        self.attn_output = nn.Linear(shape.dim, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.epsilon)
        self.ffn_gate = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.ffn_up = nn.Linear(shape.dim, shape.hidden, bias=False)
        self.ffn_down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer to (batch, length, dim)."""
        y = self.attn_norm(x)
        query = rotate(self._split(self.attn_q(y)), cos, sin)
        key = rotate(self._split(self.attn_k(y)), cos, sin)
        value = self._split(self.attn_v(y))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(x.shape))
        y = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def _split(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        return x.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)


class Llama(nn.Module):
    """The whole model; the output layer shares its weights with the embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(shape.vocab, shape.dim)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.dim, eps=shape.epsilon)
        half = shape.dim // shape.heads // 2
        frequencies = shape.rope_base ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(shape.context).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deviation = 0.02 if "embd" in name else 0.6 * shape.dim**-0.5
                if name.endswith(("attn_output.weight", "ffn_down.weight")):
                    deviation *= (2 * shape.layers) ** -0.5
                nn.init.normal_(parameter, std=deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        """The last hidden states of (batch, length) tokens."""
        x = self.token_embd(tokens)
        length = tokens.shape[1]
        for block in self.blk:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.output_norm(x)

    def loss(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Mean loss over the tokens of a batch, each with its weight."""
        wanted = weights[:, 1:] > 0
        weight = weights[:, 1:][wanted]
        hidden = self(tokens[:, :-1])[wanted]
        logits = functional.linear(hidden, self.token_embd.weight).float()
        losses = functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="none")
        return (losses * weight).sum() / weight.sum()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on pairs of neighbouring values."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


# -- text to tokens --------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer (as in GPT-2) learned from the generated text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for document in documents(seed, 12_000) for text, _ in document)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_to_remember(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens of names, characters, places and things, which a story has to keep using."""
    lists = (words.GIRLS, words.BOYS, words.KINDS, words.THINGS, words.COLOURS, words.PLACES, words.FOODS)
    encodings = tokenizer.encode_batch([f" {word}" for group in lists for word in group])
    return frozenset(
        number
        for encoding in encodings
        for number, token in zip(encoding.ids, encoding.tokens, strict=True)
        if len(encoding.ids) == 1 or len(token) > 4
    )


class Packer:
    """Packs documents into rows of a fixed length that all begin with the start of a document.

    A token has the code 0 if it is only read, 1 if it is learned, and 2 if it is learned and
    repeats a name or thing that the document has mentioned before.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._remember = tokens_to_remember(tokenizer)
        self._rng = random.Random(seed)
        self._source = documents(seed, 1 << 40)
        self._encoded = itertools.chain.from_iterable(iter(self._encode_some, None))

    def batch(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """``count`` rows of ``length`` + 1 tokens, and their codes."""
        tokens = np.zeros((count, length + 1), dtype=np.int64)
        codes = np.zeros((count, length + 1), dtype=np.int64)
        for row in range(count):
            ids: list[int] = []
            marks: list[int] = []
            while len(ids) <= length:
                document = next(self._encoded)
                ids += document[0]
                marks += document[1]
            tokens[row], codes[row] = ids[: length + 1], marks[: length + 1]
        return torch.from_numpy(tokens), torch.from_numpy(codes)

    def _encode_some(self) -> list[Encoded]:
        """Encode the next documents.

        A share of the learned parts is cut at a random character, as a prompt that ends in the
        middle of a word or after a space would be.
        """
        pieces: list[tuple[int, str, bool, bool]] = []
        for number, document in enumerate(itertools.islice(self._source, 512)):
            for text, learn in document:
                if learn and len(text) > 40 and self._rng.random() < 0.12:
                    cut = self._rng.randrange(1, min(len(text) - 1, 200))
                    pieces.append((number, text[:cut], True, True))
                    pieces.append((number, text[cut:], True, False))
                else:
                    pieces.append((number, text, learn, False))
        encodings = self._tokenizer.encode_batch([text for _, text, _, _ in pieces])
        encoded: list[Encoded] = []
        for _, group in itertools.groupby(zip(pieces, encodings, strict=True), key=lambda x: x[0][0]):
            ids: list[int] = []
            codes: list[int] = []
            seen: set[int] = set()
            for (_, _, learn, is_cut), encoding in group:
                for number in encoding.ids:
                    ids.append(number)
                    codes.append((2 if number in seen else 1) if learn else 0)
                    if number in self._remember:
                        seen.add(number)
                if is_cut:
                    codes[-1] = 0
            encoded.append((ids, codes))
        return encoded


# -- training --------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short rise, then half a cosine down to a fiftieth of the peak."""
    if step < 50:
        return peak * (step + 1) / 50
    progress = (step - 50) / max(1, steps - 50)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Llama, packer: Packer, steps: int, stop: int, peak: float, checkpoint: Path) -> float:
    """Train the model for the first ``stop`` of ``steps`` and return its mean loss over the last ones."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embd" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embd" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    begin = time.monotonic()
    recent: list[float] = []
    seen = 0
    for step in range(min(stop, steps)):
        # One step in ten sees rows as long as the context, so that the far end is trained too.
        count, length = (2, 2047) if step % 10 == 9 else (10, 320)
        tokens, codes = packer.batch(count, length)
        # At first, keeping to the names and things of a story counts more than anything else.
        emphasis = 4.0 if step < 0.6 * steps else 1.0
        weights = torch.where(codes == 2, emphasis, codes.float())
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(tokens, weights)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += count * length
        recent = [*recent[-199:], loss.item()]
        if step % 50 == 49:
            mean = sum(recent[-50:]) / len(recent[-50:])
            seconds = time.monotonic() - begin
            print(f"step {step + 1} loss {mean:.4f} tokens {seen} seconds {seconds:.0f}", flush=True)
        if step % 250 == 249:
            torch.save(model.state_dict(), checkpoint)
    torch.save(model.state_dict(), checkpoint)
    return sum(recent) / len(recent)


# -- export ----------------------------------------------------------------------------------------


def export(model: Llama, shape: Shape, tokenizer: Tokenizer, path: Path) -> None:
    """Write the model as GGUF: matrices as Q8_0, norms as F32."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("QMesh Demo")
    writer.add_author("QMesh")
    writer.add_license("apache-2.0")
    writer.add_description("A tiny story teller that shows that the mesh works. A demo, not an assistant.")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)

    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    merges = gguf_merges(tokenizer)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocab[END_OF_TEXT])
    writer.add_eos_token_id(vocab[END_OF_TEXT])
    writer.add_eot_token_id(vocab[IM_END])
    writer.add_pad_token_id(vocab[END_OF_TEXT])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            quantized = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_merges(tokenizer: Tokenizer) -> list[str]:
    """The merges of the tokenizer, in order, as GGUF stores them."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def main() -> None:
    """Train and export, or export an earlier checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=2800, help="steps of the learning-rate schedule")
    parser.add_argument("--stop", type=int, default=2250, help="end the training after this many of them")
    parser.add_argument("--peak", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="write the last checkpoint")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint.pt"
    shape = Shape()
    tokenizer = train_tokenizer(arguments.seed, shape.vocab)
    tokenizer.save(str(arguments.work / "tokenizer.json"))
    model = Llama(shape)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    if arguments.export_only:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        packer = Packer(tokenizer, arguments.seed + 1)
        loss = train(model, packer, arguments.steps, arguments.stop, arguments.peak, checkpoint)
        print(f"mean loss of the last 200 steps: {loss:.4f}")
    export(model, shape, tokenizer, arguments.out)
    print(f"{arguments.out.name}: {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
