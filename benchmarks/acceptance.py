"""Acceptance of a drafter along texts that its target wrote: every position in one batched pass.

Chains are read off the target's own answers (``ppow.training.acceptance``). A tree is measured by really decoding with
it, in batches.
"""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig

from ppow.drafting_ppow import call_config, what_was_drafted
from ppow.training.acceptance import Along, verifications
from ppow.training.answers import answer, padded_left
from ppow.training.evaluate import ends_in_a_loop
from ppow.training.files import write_json
from ppow.training.prompts import first_turn, prompt_sets, sampling_options
from ppow.training.target import FrozenTarget

TREE = {"tree_depth": 7, "tree_top_k": 10}


def kept_texts(arguments, write) -> dict:
    """The target's answers: from ``--texts`` where that file exists; else what ``write()`` returns, put into that file.

    Raises:
        ValueError: for a file of answers to other prompts, or of another target or length.
    """
    path = arguments.texts
    if path and path.exists():
        held = json.loads(path.read_text())
        if held["made_for"] != (now := made_for(arguments)):
            raise ValueError(f"{path} was written for {held['made_for']}, not for {now}; name another file.")
        return held["texts"]
    texts = write()
    if path:
        keep_texts(path, arguments, texts)
    return texts


def keep_texts(path: Path, arguments, texts: dict) -> None:
    write_json(path, {"made_for": made_for(arguments), "texts": texts})


def made_for(arguments) -> dict:
    """What the target's answers depend on."""
    names = ("target", "prompts", "prompts_dir", "limit", "max_new_tokens", "eval_batch", "dtype", "seed")
    return {name: getattr(arguments, name) for name in names}


@torch.no_grad()
def write_texts(model, tokenizer, arguments, pad: int) -> dict:
    """The target's own answers to every prompt: "DOMAIN T=0" -> prompt lengths, ids, tokens to gain, loops."""
    limit = model.config.get_text_config(decoder=True).max_position_embeddings - arguments.max_new_tokens
    domains = {}
    sets = prompt_sets(arguments.prompts.split(","), arguments.prompts_dir, arguments.limit)
    for domain, prompts in sets.items():
        domains[domain] = [ids for ids in (first_turn(tokenizer, p) for p in prompts) if len(ids) <= limit]
    texts, every = {}, [ids for prompts in domains.values() for ids in prompts]  # batches know no domains
    for temperature in (0, 1):
        torch.manual_seed(arguments.seed)
        config, found = generation(model, temperature, arguments, pad), []
        for first in range(0, len(every), arguments.eval_batch):
            found += answer(model, every[first : first + arguments.eval_batch], config)
        answers = iter(found)
        for domain, prompts in domains.items():
            # the prompt's forward yields the first token, and a text of one token is never drafted for
            pairs = [(p, a) for p, a in zip(prompts, answers) if len(a) > 1]
            texts[f"{domain} T={temperature}"] = {
                "prompt": [len(p) for p, _ in pairs],
                "ids": [p + a for p, a in pairs],
                "tokens": [len(a) - 1 for _, a in pairs],
                "loops": [ends_in_a_loop(a) for _, a in pairs],
            }
    return texts


def generation(model, temperature: float, arguments, pad: int, **more) -> GenerationConfig:
    settings = {**sampling_options(temperature), "max_new_tokens": arguments.max_new_tokens, "pad_token_id": pad}
    return call_config(model.generation_config, **settings, **more)


@torch.no_grad()
def measure(target: FrozenTarget, drafter, texts: dict, arguments, pad: int, trees: bool) -> dict:
    """Verifications that each text takes: "DOMAIN T=0" -> chain; with ``trees`` also "tree N", on some T=0.

    A block drafter's chains and trees are no longer than its block.
    """
    drafter, results = drafter.eval(), {}
    size = min(arguments.window_size, drafter.config.longest_window or arguments.window_size)
    for parameter in drafter.parameters():  # as it would be deployed; the rotary frequencies keep their precision
        parameter.data = parameter.data.to(target.model.dtype)
    for name, text in texts.items():
        order = sorted(range(len(text["ids"])), key=lambda i: len(text["ids"][i]))  # less padding
        chain = [0.0] * len(order)
        for first in range(0, len(order), arguments.eval_batch):
            part = order[first : first + arguments.eval_batch]
            ids, prompt = [text["ids"][i] for i in part], [text["prompt"][i] for i in part]
            windows = Along(target, ids, prompt, pad).windows(drafter, size)
            stands = windows.chances if name.endswith("T=1") else windows.stands
            for i, count in zip(part, verifications(stands, [text["tokens"][i] for i in part])):
                chain[i] = round(count, 4)
        results[name] = {"chain": chain}
    if trees:
        greedy = [name for name in texts if name.endswith("T=0")]
        for nodes in map(int, arguments.tree_nodes.split(",")):
            counts = decode_tree(target.model, drafter, [texts[n] for n in greedy], nodes, arguments, pad)
            for name, found in zip(greedy, counts):
                results[name][f"tree {nodes}"] = found
    return results


def decode_tree(model, drafter, texts: list[dict], nodes: int, arguments, pad: int) -> list[list[float]]:
    """Verifications of each domain's first ``tree_prompts`` texts when really decoded with trees of so many nodes."""
    work = [
        (ids[:length], tokens)
        for text in texts
        for ids, length, tokens in list(zip(text["ids"], text["prompt"], text["tokens"]))[: arguments.tree_prompts]
    ]
    options = {**TREE, "tree_nodes": nodes, "cuda_graphs": False}
    options["tree_depth"] = min(TREE["tree_depth"], drafter.config.longest_window or TREE["tree_depth"])
    config, found = generation(model, 0, arguments, pad, **options, return_dict_in_generate=True), []
    for first in range(0, len(work), arguments.eval_batch):
        part = work[first : first + arguments.eval_batch]
        inputs = padded_left([ids for ids, _ in part], pad, model.device)
        out = model.generate(**inputs, generation_config=config, assistant_model=drafter)
        what_was_drafted(out, options)
        # a batch's arithmetic can leave the text at a near tie: count per token gained, on the text's own length
        for (_, tokens), gained in zip(part, out.acceptance.gained):
            found.append(len(gained) * tokens / max(1, sum(gained)))
    counts = iter(found)
    return [[next(counts) for _ in text["ids"][: arguments.tree_prompts]] for text in texts]
