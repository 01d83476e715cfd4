"""Config in; the prompts that the evaluation answers out.

Held-out prompts of the data set, or those of a file: chats, questions of MT-bench's or Spec-Bench's
form, or plain text.
"""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data import DataError, Message, read_conversations
from medusa_exp.data.prompts import Prompt, prompts_of
from medusa_exp.data.questions import Question, is_question_file, read_questions
from medusa_exp.data.sources import load_split
from medusa_exp.data.template import ChatTemplate
from medusa_exp.errors import UserError
from medusa_exp.runs.progress import track

log = logging.getLogger(__name__)

Answer = Callable[[list[int]], list[int]]
"""From a prompt's tokens to those of its answer."""


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, max_positions: int, answer: Answer
) -> list[Prompt]:
    """Return `evaluate.num_prompts` prompts, or as many as there are.

    Args:
        config: `evaluate.path` names a file; None stands for the test split.
        tokenizer: whose chat template makes prompts.
        max_positions: of a prompt and its answer.
        answer: plain decoding: a question's later turns follow its answers to the earlier ones.

    Raises:
        UserError: there is no such file, or no prompt leaves room for an answer.
        DataError: the file cannot be read.
    """
    count = config.evaluate.num_prompts
    if config.evaluate.path is None:
        conversations = load_split(config, "test")
        return prompts_of(
            conversations, tokenizer, config, max_positions=max_positions, num_prompts=count
        )
    path = Path(config.evaluate.path)
    if not path.exists():
        raise UserError(f"evaluate.path={path} does not exist.")
    if path.is_file() and is_question_file(path):
        questions = _spread(read_questions(path), count)
        room = max_positions - config.decode.max_new_tokens
        return _of_questions(questions, tokenizer, room, answer)
    reading = read_conversations(path)
    try:
        return prompts_of(
            reading, tokenizer, config, max_positions=max_positions, num_prompts=count
        )
    finally:  # where no prompt is left, that is why
        for reason, number in reading.dropped.items():
            log.warning("evaluate.path: dropped: %s: %d", reason, number)


def _spread(questions: list[Question], num_prompts: int) -> list[Question]:
    """Return evenly spread questions of so many turns in all: such files are sorted by category."""
    turns = np.mean([len(question.turns) for question in questions])
    count = min(len(questions), max(1, round(num_prompts / turns)))
    return [questions[i] for i in np.linspace(0, len(questions) - 1, count).round().astype(int)]


def _of_questions(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, room: int, answer: Answer
) -> list[Prompt]:
    template = ChatTemplate(tokenizer)
    left_out: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for question in track(questions, "asking first turns"):
        messages: list[Message] = []
        for turn, text in enumerate(question.turns):
            messages.append(Message("user", text))
            try:
                prompt_text = template.prompt(messages)
            except DataError:
                left_out["refused by the chat template"] += len(question.turns) - turn
                break
            ids = tokenizer(prompt_text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > room:
                left_out[f"more than {room} tokens"] += len(question.turns) - turn
                break
            prompt_id = f"{question.question_id}#{turn}"
            prompts.append(Prompt(prompt_id, question.category, prompt_text, ids))
            if turn + 1 < len(question.turns):
                said = tokenizer.decode(answer(ids), skip_special_tokens=True)
                messages.append(Message("assistant", said))
    for reason, number in left_out.items():
        log.warning("evaluate.path: prompts left out: %s: %d", reason, number)
    if not prompts:
        raise UserError(f"evaluate.path: no question leaves room for an answer ({dict(left_out)}).")
    return prompts
