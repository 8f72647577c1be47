"""What a chat template writes, in training batches and in prompts of every family, beside transformers' own reading."""

from __future__ import annotations

import json

import pyarrow
import pytest
import torch
from PIL import Image
from processors_tiny import WITH_PROCESSOR
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llavolta import compress
from llavolta.data import Collator, DataError, Example, LlavaData, chat, find_too_long
from llavolta.data.collate import IGNORED
from llavolta.studies import evaluation
from llavolta.worlds import backbones

FAMILIES = {"llava": lambda: (None, backbones.processor()), **WITH_PROCESSOR}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def turn(role: str, *parts: str) -> dict:
    """``"image"`` among ``parts`` is one, all else is text."""
    return {"role": role, "content": [{"type": p} if p == "image" else {"type": "text", "text": p} for p in parts]}


def own_ids(processor, messages: list[dict], images: list, **options) -> list[int]:
    """What transformers itself makes of a conversation, tokenized."""
    left = iter(images)
    messages = [
        {**m, "content": [{**p, "image": next(left)} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]
    [ids] = processor.apply_chat_template(messages, tokenize=True, return_tensors="pt", **options)
    return ids.tolist()


def test_ids_are_those_of_transformers_with_one_begin_token(family):
    model, processor = family
    messages = [turn("user", "image", "is there a 3 ?"), turn("assistant", "yes"), turn("user", "is there a 4 ?")]
    ended = [*messages, turn("assistant", "no")]
    begin, looks = processor.tokenizer.bos_token_id, [picture()]
    batch = Collator(processor)([Example(ended, looks, "x")])
    assert batch["input_ids"][0].tolist() == own_ids(processor, ended, looks)
    assert (batch["input_ids"] == begin).sum() == 1
    device = torch.nn.Linear(1, 1)
    device.device, device.dtype = torch.device("cpu"), torch.float32
    prompt = evaluation.prompts(device, processor, [(messages, looks)])["input_ids"]
    assert prompt[0].tolist() == own_ids(processor, messages, looks, add_generation_prompt=True)
    assert (prompt == begin).sum() == 1
    assert batch["input_ids"][0, : prompt.shape[1]].tolist() == prompt[0].tolist()  # asked as trained


def test_a_quoted_control_token_is_text_and_changes_no_label_and_no_image(family):
    """As an image token, an end token or a turn's mark, in a question or an answer, with an image or without."""
    _, processor = family
    collate, tokenizer = Collator(processor), processor.tokenizer
    named = {value for value in vars(processor).values() if isinstance(value, str)}
    added = {token for token in tokenizer.get_added_vocab() if token in named or token in tokenizer.chat_template}
    quoted = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, *added}
    assert processor.image_token in quoted
    for images in ([], [picture()]):
        ask, answer = [*["image"] * len(images), "is there a 3 ?"], "yes"
        plain = collate([Example([turn("user", *ask), turn("assistant", answer)], images, "x")])
        special = torch.tensor(tokenizer.all_special_ids)
        count = torch.isin(plain["input_ids"], special).sum()
        for token in quoted:
            for place in (0, 1):
                texts = [ask[-1] + place * token, answer + (1 - place) * f" {token}"]
                messages = [turn("user", *ask[:-1], texts[0]), turn("assistant", texts[1])]
                batch = collate([Example(messages, images, "x")])
                unknown = batch["input_ids"] == tokenizer.unk_token_id  # this tokenizer knows few words
                assert torch.isin(batch["input_ids"], special).sum() - unknown.sum() == count
                labels = batch["labels"][batch["labels"] != IGNORED]
                assert (labels == tokenizer.eos_token_id).sum() == 1


def test_special_tokens_that_the_template_does_not_write_are_a_data_sets_own():
    _, processor = WITH_PROCESSOR["qwen2_5_vl"]()
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|box_start|>"]}, False)
    assert chat.as_text(processor, "<|box_start|> <|image_pad|>") == "<|box_start|> < |image_pad|>"


METASPACE = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,?", "▁y", "▁ye", "▁yes"]


@pytest.mark.parametrize("end", [" ", ""])
def test_the_first_token_of_an_answer_is_learned_where_it_holds_the_blank_of_the_prompt(end):
    words = models.BPE({token: n for n, token in enumerate(METASPACE)}, [("▁", "y"), ("▁y", "e"), ("▁ye", "s")])
    core = Tokenizer(words)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    named = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    processor = backbones.processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    answer = "A: " if end else "A:"
    processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'][0]['text'] }} {% else %}"
        f"{answer}{{{{ '{'' if end else ' '}' + m['content'][0]['text'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )
    messages = [turn("user", "is it?"), turn("assistant", "yes"), turn("user", "so?"), turn("assistant", "no")]
    batch = Collator(processor)([Example(messages, [], "x")])
    labels = batch["labels"][batch["labels"] != IGNORED].tolist()
    blank = [] if end else ["▁"]  # the prompt's own, where it ends in one
    assert processor.tokenizer.convert_ids_to_tokens(labels) == ["▁yes", "</s>", *blank, "n", "o", "</s>"]


def test_a_template_that_refuses_system_turns_refuses_an_entry_by_name(tmp_path):
    processor = backbones.processor()
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + processor.chat_template
    )
    turns = [{"from": "human", "value": "is there a 3?"}, {"from": "gpt", "value": "yes"}]
    entries = [{"id": "a", "conversations": turns}]
    entries.append({"id": "b", "conversations": [{"from": "system", "value": "yes"}, *turns]})
    (tmp_path / "d.json").write_text(json.dumps(entries))
    data, collate = LlavaData(tmp_path / "d.json"), Collator(processor)
    bad = find_too_long(data, collate, progress=False)
    refused = "entry 1 (id 'b'): the model's chat template refuses these turns (system, user, assistant): System role"
    assert list(bad) == [1] and refused in bad[1]
    assert len(data.without(bad)) == 1
    with pytest.raises(DataError, match="System role not supported"):
        collate([data[1]])


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_many_short_turns_are_found_too_long_before_training(tmp_path, kind):
    """What the template writes around each is most of it, and puts the image of the last one behind the cut."""
    processor = backbones.processor()
    behind = "{% else %} {% endif %}{% endfor %}"
    assert behind in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        behind, behind.replace(" {% endif", " no" * 10 + " {% endif")
    )
    picture().save(tmp_path / "a.png")
    rows = []
    for count in (2, 20):
        messages = [{"role": role, "content": "3"} for role in ("user", "assistant") * count]
        messages[-2]["content"] = "<image>3"
        content = (tmp_path / "a.png").read_bytes()
        image = {"image": "a.png"} if kind == "json" else {"images": [{"bytes": content, "path": None}]}
        rows.append({"messages": messages} | image)
    file = tmp_path / f"d.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    data, collate, refused = LlavaData(file), Collator(processor, 320), {}
    for index in range(2):
        try:
            collate([data[index]])
        except DataError as error:
            refused[index] = str(error)
    assert list(refused) == [1] and "cuts off visual tokens" in refused[1]
    assert find_too_long(data, collate, progress=False) == refused


def test_a_conversation_of_two_thousand_turns_takes_time_in_proportion():
    processor, words = backbones.processor(), [turn("user", "is there a 3 ?"), turn("assistant", "yes")]
    written = []
    with pytest.MonkeyPatch.context() as patch:
        real = type(processor).apply_chat_template
        count = lambda self, messages, **options: written.append(len(messages)) or real(self, messages, **options)  # noqa: E731
        patch.setattr(type(processor), "apply_chat_template", count)
        batch = Collator(processor, 100_000)([Example(words * 1000, [], "x")])
    assert (batch["labels"] == processor.tokenizer.eos_token_id).sum() == 1000
    assert sum(written) < 3 * 2000  # messages that the template wrote


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3"])
def test_an_entry_of_300_images(name):
    _, processor = WITH_PROCESSOR[name]()
    asked = [turn("user", *["image"] * 300, "is there a 3 ?"), turn("assistant", "yes")]
    batch = Collator(processor, 100_000)([Example(asked, [picture()] * 300, "x")])
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]).split() == ["yes", "</s>"]


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_a_text_among_rows_of_images_has_the_loss_that_it_has_alone(name):
    torch.manual_seed(0)
    model, processor = WITH_PROCESSOR[name]()
    collate, model = Collator(processor), model.eval()
    answer = turn("assistant", "yes")
    kinds = {
        "t": Example([turn("user", "is there a 3 ?"), answer], [], "t"),
        "i": Example([turn("user", "image", "is there a 3 ?"), answer], [picture()], "i"),
    }
    with torch.no_grad(), compress(model, "1:avgpool:4"):
        alone = {kind: model(**collate([kinds[kind]])).loss for kind in kinds}
        for order in ("tii", "iti", "iit"):
            together = model(**collate([kinds[kind] for kind in order])).loss
            torch.testing.assert_close(together, (alone["t"] + 2 * alone["i"]) / 3, rtol=1e-4, atol=1e-4)


def test_questions_are_asked_in_the_places_where_they_are_trained(tmp_path):
    """System turns, images between words, and the images of earlier questions; not those of later ones."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        picture(colour).save(tmp_path / f"{name}.png")
    texts = ["system: yes", "human: is <image> a 3 ? is <image> a 4 ?", "gpt: yes", "human: and <image> ?", "gpt: no"]
    turns = [dict(zip(("from", "value"), text.split(": ", 1), strict=True)) for text in texts]
    (tmp_path / "d.json").write_text(json.dumps([{"image": ["a.png", "b.png", "c.png"], "conversations": turns}]))
    data = LlavaData(tmp_path / "d.json")
    first, second = evaluation.pictured(data, list(data.questions()))
    trained = data[0]
    assert first == (trained.messages[:2], trained.images[:2])
    assert second[1] == trained.images
    assert second[0][0] == trained.messages[0]
    assert [part["type"] for part in second[0][1]["content"]] == ["image", "image", "text", "image", "text"]
    assert second[0][1]["content"][2:] == trained.messages[3]["content"]
    red, blue = trained.images[:2]
    asked = evaluation.chat_of("is <image> a 3 ? is <image> a 4 ?", [red, blue])
    assert asked == trained.messages[1:2]  # as benchmarks write questions about several images
    assert evaluation.chat_of("is it?", [red])[0]["content"][0] == {"type": "image"}
