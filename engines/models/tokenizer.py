"""Training of a byte-level BPE tokenizer for a model that is made from nothing."""

from __future__ import annotations

from pathlib import Path

START = "<|start|>"
# Words take one leading space or sign; a line end takes the indentation that follows it, which code is full of.
PATTERN = r"""\s*\n[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"""


def train_tokenizer(texts: list[str], vocabulary: int, folder: str | Path) -> int:
    """Train on ``texts`` and write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        vocabulary: number of tokens, the 256 bytes and the start token included.

    Returns:
        The number of tokens in the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[START], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START, pad_token=START,
                                   clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()
