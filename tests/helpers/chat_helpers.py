"""Tokenizers with other chat templates, and what of an example is to be learned."""

from ppow.training.data import Example


def with_template(tokenizer, template):
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def masked_runs(example: Example, tokenizer) -> list[str]:
    """The decoded runs of masked tokens."""
    runs, previous = [], 0
    for token, flag in zip(example.input_ids, example.loss_mask):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in runs]
