"""Train a small Llama that really speaks, on the CPU, in about a minute.

Holds: the text, the byte-level BPE tokenizer, the training loop, and the folder it writes (Hugging Face layout: sharded
safetensors, tokenizer, chat template; `training.json` with the settings; `held_out.json`, the documents never trained
on). It deliberately knows nothing of scalellm: the toolchain reads this folder as it reads any other.

The text is `pydoc_data.topics`, which every Python has, and `tiny_llama_text.md` beside this file. The number of steps
is fixed, so the same machine makes the same model; `--seconds` only cuts a slow machine short.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEXT_FILE = Path(__file__).with_name("tiny_llama_text.md")
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # UNK pads
HEAD_DIM = 64
MAX_POSITIONS = 2048
STEPS, STEP_TOKENS = 220, 1024
MUON_RATE, ADAM_RATE = 0.02, 0.01  # the best of a few tried
HELD_OUT_ONE_IN = 14
TOPIC_CHARS = 1500  # of each topic of Python's documentation, or it would drown the conversations
TIMES_BELOW_UNIFORM = 5

# Llama-2's layout, with one difference: no <s> in front of the FIRST turn. The rendered text goes through an ordinary
# encode, whose post-processor puts <s> there exactly once. Whoever encodes with add_special_tokens=False (as
# apply_chat_template(tokenize=True) does) passes add_bos=True to the template, and again there is exactly one.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{% if not loop.first or add_bos %}{{ bos_token }}{% endif %}"
    "{{ '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
)


class Words:
    """Fills `{list}`, `{list.field}`, `{list2}` and `{a|b}`; each list is a shuffled bag, emptied before it repeats."""

    def __init__(self, lists: dict[str, list[dict[str, str]]], seed: int) -> None:
        self.lists, self.bags = lists, {name: [] for name in lists}
        self.random = random.Random(seed)

    def draw(self, name: str, taken: list[dict[str, str]]) -> dict[str, str]:
        while True:
            if not self.bags[name]:
                self.bags[name] = self.random.sample(self.lists[name], len(self.lists[name]))
            entry = self.bags[name].pop()
            if entry not in taken:
                return entry

    def fill(self, text: str) -> str:
        drawn: dict[str, dict[str, str]] = {}

        def value(match: re.Match[str]) -> str:
            slot = match[1]
            if "|" in slot:
                return self.random.choice(slot.split("|"))
            key, _, field = slot.partition(".")
            if key not in drawn:
                drawn[key] = self.draw(key.rstrip("0123456789"), list(drawn.values()))
            word = drawn[key][field.lower() or "name"]
            return word[:1].upper() + word[1:] if field[:1].isupper() else word

        while "{" in text:  # an alternative may hold a slot: {a|b} is the innermost pair of braces
            text = re.sub(r"\{([^{}]*)\}", value, text)
        return re.sub(r"\b([Aa]) (?=[aeio](?!ne ))", r"\1n ", text)


def read_lists(body: str) -> dict[str, list[dict[str, str]]]:
    """`- country(name, capital): France, Paris; Italy, Rome` -> {"country": [{"name": "France", ...}, ...]}."""
    lists = {}
    for name, fields, entries in re.findall(r"^- (\w+)\(([^)]*)\): (.*)$", body, re.M):
        names = [field.strip() for field in fields.split(",")]
        rows = [[cell.strip() for cell in entry.split(",", len(names) - 1)] for entry in entries.split(";")]
        lists[name] = [dict(zip(names, row, strict=True)) for row in rows]
    return lists


def as_chat(body: str) -> str:
    """Lines `system: ...`, `user: ...`, `bot: ...` -> the chat template's text (a test holds the two together)."""
    text, system = "", ""
    for role, content in re.findall(r"^(system|user|bot): (.*?)(?=\n(?:user|bot): |\Z)", body, re.M | re.S):
        if role == "system":
            system = f"<<SYS>>\n{content.strip()}\n<</SYS>>\n\n"
        elif role == "user":
            text, system = f"{text}{BOS if text else ''}[INST] {system}{content.strip()} [/INST]", ""
        else:
            text += f" {content.strip()}{EOS}"
    return text


def documents(seed: int) -> tuple[list[str], list[str]]:
    """(documents to train on, documents held out). A title's hash decides, so that no copy of one is in the other."""
    sections = re.split(r"^## ", TEXT_FILE.read_text(encoding="utf-8"), flags=re.M)[1:]
    words = Words(read_lists(sections[0]), seed)
    split: tuple[list[str], list[str]] = ([], [])
    for section in sections[1:]:
        head, _, body = section.partition("\n")
        kind, copies, title = head.split(" ", 2)
        for _ in range(int(copies)):
            text = words.fill(body.strip())
            split[held_out(title)].append(as_chat(text) if kind == "chat" else text + EOS)
    for title, text in sorted(python_topics().items()):
        split[held_out(title)].append(text.strip() + EOS)
    return split


def held_out(title: str) -> bool:
    return int(hashlib.sha256(title.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def python_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions take it out: the project's own text is enough to speak
        return {}
    return {title: prose(text) for title, text in topics.items()}


def prose(text: str) -> str:
    """Only the paragraphs that are sentences: no code, no grammars, no headings; lines joined."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith((" ", "*", "="))]
    sentences = "\n\n".join(part for part in paragraphs if part.endswith((".", ":", "?")) and "**" not in part)
    return sentences[:TOPIC_CHARS].rpartition("\n\n")[0] or sentences[:TOPIC_CHARS]


def train_tokenizer(texts: list[str], vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[UNK, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((text.replace(BOS, "").replace(EOS, "") for text in texts), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNK,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // HEAD_DIM,
        num_key_value_heads=args.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=args.tied,
        **SPECIAL_IDS,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # each layer begins as the identity: halves the perplexity of so short a run
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def rows(encoded: list[list[int]], seed: int) -> Iterator[Any]:
    """Endless batches [n, length] of packed documents, each row starting with <s>; a few see the whole context."""
    import torch

    order, stream = random.Random(seed), []
    for length in itertools.cycle((128, 256, 128, 1024, 256, 128, 256, 128, 512, 128, 256, MAX_POSITIONS)):
        size = max(STEP_TOKENS, length)
        while len(stream) < size:
            for document in order.sample(encoded, len(encoded)):
                stream += document
        batch, stream = torch.tensor(stream[:size]).view(-1, length), stream[size:]
        batch[:, 0] = SPECIAL_IDS["bos_token_id"]
        yield batch


def learning_rate(done: float) -> float:
    """Share of the run done (0..1) -> share of the peak rate: linear warm-up over 4 %, then cosine down to 2 %."""
    return done / 0.04 if done < 0.04 else 0.02 + 0.49 * (1 + math.cos(math.pi * (done - 0.04) / 0.96))


def orthogonal(update: Any) -> Any:
    """The nearest orthogonal matrix, roughly: three Newton-Schulz steps in float32, [m, n] -> [m, n].

    The coefficients are those of Muon (https://kellerjordan.github.io/posts/muon/, read 2026-11-22). torch.optim.Muon
    does the same in bfloat16, which most CPUs only emulate.
    """
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


class Muon:
    """Momentum, then an orthogonal step. On this little text it needs half of AdamW's tokens; for matrices only."""

    def __init__(self, matrices: list[Any]) -> None:
        self.matrices, self.momenta = matrices, [matrix.detach() * 0 for matrix in matrices]

    def step(self, rate: float) -> None:
        import torch

        with torch.no_grad():
            for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
                momentum.lerp_(matrix.grad, 0.05)
                tall = max(1.0, matrix.shape[0] / matrix.shape[1])
                matrix.add_(orthogonal(matrix.grad.lerp(momentum, 0.95)), alpha=-rate * math.sqrt(tall))


def train(model: Any, encoded: list[list[int]], args: argparse.Namespace, show: Any) -> int:
    """Trains in place in float32: Muon for the linears of the layers, AdamW for the rest. Returns the steps taken."""
    import torch

    linears = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    muon, adam = Muon(linears), torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    start, steps, loss = time.monotonic(), 0, math.nan
    for batch in rows(encoded, args.seed):
        done = max(steps / args.steps, (time.monotonic() - start) / args.seconds)
        if done >= 1:
            break
        share = learning_rate(max(done, 1 / args.steps))
        adam.param_groups[0]["lr"] = share * ADAM_RATE
        output = model(input_ids=batch, labels=batch, use_cache=False).loss
        output.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(share * MUON_RATE)
        adam.step()
        model.zero_grad()
        steps, loss = steps + 1, float(output.detach())
        show(done, steps, loss)
    show(1.0, steps, loss)
    return steps


def perplexity(model: Any, encoded: list[list[int]]) -> float:
    """exp(mean negative log-likelihood) over every token but <s> of each document's first 512 tokens."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for document in encoded:
            ids = torch.tensor([document[:512]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return math.exp(total / count)


class Shown:
    """A bar on a terminal, else one line every ten seconds."""

    def __init__(self) -> None:
        from rich.progress import Progress

        self.bar = Progress(disable=not sys.stdout.isatty())
        self.task, self.next_line = self.bar.add_task("training", total=1.0), 0.0

    def __call__(self, done: float, steps: int, loss: float) -> None:
        self.bar.start()
        self.bar.update(self.task, completed=done, description=f"step {steps}, loss {loss:.2f}")
        if done >= 1:
            self.bar.stop()
        if self.bar.disable and (done >= 1 or time.monotonic() >= self.next_line):
            self.next_line = time.monotonic() + 10
            print(f"{done:4.0%}  step {steps}  loss {loss:.2f}", flush=True)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Two shards or more, float16, readable by transformers 4.57 and by 5.x."""
    from transformers import GenerationConfig

    half = model.half()
    nbytes = sum(p.numel() * p.element_size() for p in half.parameters())
    half.generation_config = GenerationConfig(**SPECIAL_IDS)
    half.save_pretrained(folder, max_shard_size=nbytes // 3)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes rope_parameters and dtype, transformers 4 reads rope_theta and torch_dtype: write all four.
    edit(folder / "config.json", rope_theta=10000.0, torch_dtype="float16", dtype="float16")
    # transformers 5 names a class here that 4.x does not have; both know this one.
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT_TEMPLATE)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def finished(folder: Path, settings: dict[str, Any]) -> bool:
    """True when `folder` holds a whole model made with these settings."""
    try:
        made = json.loads((folder / "training.json").read_text())
        shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    except (OSError, ValueError):
        return False
    return made.get("settings") == settings and all((folder / shard).is_file() for shard in shards)


def write(out: Path, model: Any, tokenizer: Any, reports: dict[str, Any]) -> None:
    """Everything into a temporary sibling, then one rename; what was at `out` (a folder of ours) goes after that."""
    new, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        save(model, tokenizer, new)
        for name, content in reports.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def samples(model: Any, tokenizer: Any) -> None:
    """Three continuations and one chat answer, greedy."""
    import torch

    model = model.float().eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = ["Once upon a time", "The function returns", "A GPU is"]
    prompts.append(tokenizer.apply_chat_template(question, tokenize=False))
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
        print(f"\n> {prompt}\n{tokenizer.decode(ids[inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")


def make(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    start = time.monotonic()
    training, held = documents(args.seed)
    tokenizer = train_tokenizer(training, args.vocab)
    encoded, held_encoded = ([tokenizer.encode(text) for text in texts] for texts in (training, held))
    tokenizer.model_max_length = MAX_POSITIONS
    model = new_model(args)
    print(
        f"{model.num_parameters() / 1e6:.1f} M parameters, {len(training)} documents, "
        f"{sum(map(len, encoded))} tokens to train on, {sum(map(len, held_encoded))} held out",
        flush=True,
    )
    report: dict[str, Any] = {"settings": settings, "seed": args.seed, "steps": train(model, encoded, args, Shown())}
    model = model.half().float()  # what is measured is what is saved
    measured = perplexity(model, held_encoded)
    report |= {"held_out_perplexity": measured, "uniform_perplexity": args.vocab}
    report |= {"text_sha256": hashlib.sha256("".join(training + held).encode()).hexdigest()}
    report |= {"versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}}
    report |= {"python": platform.python_version(), "seconds": round(time.monotonic() - start, 1)}
    print("held-out perplexity {held_out_perplexity:.1f}, uniform {uniform_perplexity}; ".format(**report), end="")
    print("{steps} steps, {seconds} s".format(**report), flush=True)
    if not args.no_check and measured * TIMES_BELOW_UNIFORM > args.vocab:
        goal = f"its perplexity must be under {args.vocab / TIMES_BELOW_UNIFORM:.0f}"
        print(f"Nothing was written: {goal} to speak. Give it more --steps or --seconds.", file=sys.stderr)
        return 1
    write(args.out, model, tokenizer, {"held_out.json": held, "training.json": report})
    if not args.no_check:
        samples(model, tokenizer)
    print(f"\n{args.out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small Llama that really speaks, on the CPU, in about a minute.",
        epilog="example: python scripts/make_tiny_llama.py /tmp/tiny --layers 2",
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT_DIR", help="the folder to write (Hugging Face layout)")
    for name, default, meaning in (
        ("--seed", 0, "of the words, the order and the first weights"),
        ("--steps", STEPS, f"of about {STEP_TOKENS} tokens"),
        ("--seconds", 70, "of training, at most"),
        ("--layers", 4, "of the model"),
        ("--hidden", 256, "size, a multiple of 128"),
        ("--kv-heads", 2, f"must divide the number of heads, hidden / {HEAD_DIM}"),
        ("--vocab", 2048, "size"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{meaning} (default {default})")
    add("--tied", action="store_true", help="one matrix for embedding and output")
    add("--force", action="store_true", help="train again, and replace what this script made")
    add("--no-check", action="store_true", help="keep the model whatever its perplexity, print no samples")
    args = parser.parse_args(argv)
    if args.hidden % 128 or args.hidden // HEAD_DIM % args.kv_heads:
        parser.error(f"--hidden must be a multiple of 128, and --kv-heads must divide hidden / {HEAD_DIM}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # Read when torch is loaded: threads that spin while they wait made a busy 2-core machine four times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args.out = args.out.absolute()
    names = ("seed", "steps", "seconds", "layers", "hidden", "kv_heads", "vocab", "tied")
    settings = {name: getattr(args, name) for name in names}
    settings["source_sha256"] = hashlib.sha256(TEXT_FILE.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if finished(args.out, settings) and not args.force:
        print(f"{args.out}: already made with these settings (--force trains again)")
        return 0
    if args.out.exists() and not ((args.out / "training.json").is_file() or not any(args.out.iterdir())):
        print(f"{args.out} exists and was not made by this script. Name another folder.", file=sys.stderr)
        return 2
    return make(args, settings)


if __name__ == "__main__":
    sys.exit(main())
