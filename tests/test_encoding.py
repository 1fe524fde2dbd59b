"""Token ids depend neither on the clock nor on control tokens in the data. Each test compares with a plain reference."""

import inspect
import json
import random
import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_hrm.encoding import (
    control_tokens,
    dated_template,
    encode_around,
    find_control_text,
    plain_text_ids,
    render_chat,
    uses_clock,
)

from .fakes import ADDED, CHAT, CONTROL, GPT, INDIRECT, LLAMA, SPECIAL, TEXTS, byte_level, with_tokens


LETTERS = string.printable + "｜\ufdd0\ufdd1"


def metaspace(added: bool = True) -> PreTrainedTokenizerFast:
    """BPE with control tokens in its vocabulary, like Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    alphabet = sorted({*LETTERS.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return with_tokens(tokenizer, added)


def unigram(added: bool = True) -> PreTrainedTokenizerFast:
    """Unigram, which would encode the text `</s>` as the control token."""
    pieces = [("<unk>", 0.0), *((text, 0.0) for text in SPECIAL)]
    pieces += [("im", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    return with_tokens(tokenizer, added)


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain(tokenizer, text: str) -> list[int]:
    return plain_text_ids(tokenizer, text, ids_of(tokenizer, text))


def random_text(rng: random.Random) -> str:
    """Return ordinary text with control tokens: alone, repeated, at the ends and inside words."""
    words = [*SPECIAL, *ADDED, "x = 3", " ", "\n", "\n\n", "<", "|>", "im_end", "a", "<|", "table"]
    return "".join(rng.choices(words, k=rng.randint(1, 8)))


class TestControlTokens:
    def test_what_is_a_control_token(self, kind):
        """Special tokens, tokens in bars, and bracketed tokens in the template. White space, HTML and users' words are text."""
        assert set(control_tokens(KINDS[kind]()).values()) == CONTROL

    def test_without_a_template(self):
        """Without a template, brackets are not enough: Gemma's `<table>` is text."""
        tokenizer = byte_level()
        assert "<think>" in control_tokens(tokenizer).values()
        tokenizer.chat_template = None  # the change is noticed although the tokenizer was analysed before
        assert set(control_tokens(tokenizer).values()) == {*SPECIAL, "<｜User｜>"}
        tokenizer.add_special_tokens({"pad_token": "<table>"})
        assert "<table>" in control_tokens(tokenizer).values()

    def test_texts_are_found_in_order(self):
        tokenizer = byte_level()
        text = "a<think>b</s><table>\n\n\n<|im_end|></s>"
        assert find_control_text(tokenizer, text) == ["<think>", "</s>", "<|im_end|>", "</s>"]
        assert find_control_text(tokenizer, text, tags=False) == ["</s>", "<|im_end|>", "</s>"]
        assert find_control_text(object(), text) == []


class TestPlainText:
    def test_ids_of_ordinary_text_do_not_change(self, kind):
        tokenizer = KINDS[kind]()
        for text in [*TEXTS[:1], "a\n\n\n b", "<table>", "kilogram", "", " ", "im_end|>"]:
            assert plain(tokenizer, text) == ids_of(tokenizer, text)

    def test_equals_a_tokenizer_without_control_tokens(self, kind):
        """The reference is the same tokenizer without its control tokens."""
        tokenizer, reference = KINDS[kind](), KINDS[kind](added=False)
        rng = random.Random(0)
        changed = 0
        for text in [*SPECIAL, *ADDED, *(random_text(rng) for _ in range(300))]:
            found = plain(tokenizer, text)
            assert not set(found) & control_tokens(tokenizer).keys()
            assert tokenizer.decode(found) == text
            changed += found != ids_of(tokenizer, text)
            if kind == "byte_level":  # the others have the tokens in the model's vocabulary
                names = tokenizer.convert_ids_to_tokens(found)
                assert names == reference.convert_ids_to_tokens(ids_of(reference, text))
        assert changed > 150

    def test_text_normalized_to_a_control_token(self):
        """Tokens that are matched after normalization have several spellings."""
        tokenizer = byte_level()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        tokenizer.add_tokens([AddedToken("<|end|>", normalized=True)])
        wide = "a＜|end|＞"
        assert set(ids_of(tokenizer, wide)) & control_tokens(tokenizer).keys()
        found = plain(tokenizer, wide)
        assert not set(found) & control_tokens(tokenizer).keys() and tokenizer.decode(found) == "a<|end|>"

    def test_an_unknown_word_is_not_a_control_token(self):
        vocab = {"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
        assert plain(tokenizer, "a what b") == [2, 0, 3]
        assert plain(tokenizer, "a </s> b") == [2, 0, 3]  # a word missing from this vocabulary

    def test_a_control_token_built_by_merges_is_refused(self):
        vocab = {letter: i for i, letter in enumerate("<s>")} | {"<s": 3, "<s>": 4}
        tokenizer = Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
        with pytest.raises(ValueError, match="'<s>'.* plain text.*Remove it"):
            plain(tokenizer, "s<s>")
        assert plain(tokenizer, "s<") == [1, 0]

    def test_a_slow_tokenizer_is_refused_only_for_control_tokens(self):
        class Slow:
            chat_template = None
            unk_token_id = None
            all_special_tokens = ["<s>"]
            added_tokens_decoder = {7: AddedToken("<s>", special=True)}

            def __len__(self):
                return 8

        slow = Slow()
        assert plain_text_ids(slow, "a", [1]) == [1]
        with pytest.raises(ValueError, match="Slow cannot encode .*Use a fast tokenizer"):
            plain_text_ids(slow, "<s>", [7])

    def test_tokens_added_after_the_first_text(self):
        tokenizer = byte_level()
        assert find_control_text(tokenizer, "a<|new|>") == []
        tokenizer.add_tokens(["<|new|>"], special_tokens=True)
        assert find_control_text(tokenizer, "a<|new|>") == ["<|new|>"]
        assert not set(plain(tokenizer, "a<|new|>")) & control_tokens(tokenizer).keys()
        tokenizer.add_tokens(["<|newer|>"])
        assert find_control_text(tokenizer, "a<|newer|>") == ["<|newer|>"]

    def test_the_added_tokens_are_read_once(self, monkeypatch):
        """Building the set takes 15 ms with Gemma's tokenizer, which once made encoding 80 times slower."""
        tokenizer, reads = byte_level(), []
        made = type(tokenizer).added_tokens_decoder.fget
        monkeypatch.setattr(
            type(tokenizer), "added_tokens_decoder", property(lambda self: reads.append("decoder") or made(self))
        )
        size = type(tokenizer).__len__
        monkeypatch.setattr(type(tokenizer), "__len__", lambda self: reads.append("len") or size(self))
        plain(tokenizer, "a")
        del reads[:]
        for i in range(5):
            plain(tokenizer, f"a{i}"), find_control_text(tokenizer, f"a{i}")
        assert reads == []

    def test_the_tokenizer_is_not_changed(self):
        tokenizer = byte_level()
        before = tokenizer.backend_tokenizer.to_str()
        plain(tokenizer, "a<|im_end|>")
        assert tokenizer.backend_tokenizer.to_str() == before


class TestDataInATemplate:
    def render(self, tokenizer):
        return lambda text: render_chat(tokenizer, [{"role": "user", "content": text}], None, None)

    def test_only_the_template_writes_control_tokens(self, kind):
        tokenizer = KINDS[kind]()
        render, control = self.render(tokenizer), control_tokens(tokenizer)
        expected = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>"]
        rng = random.Random(1)
        for text in ["1+1?", *(random_text(rng) for _ in range(100)), "\ufdd0<|im_end|>\ufdd1", "</s>" * 3]:
            found = encode_around(tokenizer, text, render)
            assert [control[i] for i in found if i in control] == expected
            assert tokenizer.decode(found) == render(text)

    def test_ids_of_ordinary_data_do_not_change(self, kind):
        tokenizer = KINDS[kind]()
        messages = [{"role": "user", "content": TEXTS[0]}]
        found = encode_around(tokenizer, TEXTS[0], self.render(tokenizer))
        assert found == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    def test_equals_transformers_sanitize_control_tokens(self):
        """Where tokens are split at the boundary anyway, the ids equal those from transformers' `sanitize_control_tokens`."""
        tokenizer = byte_level()
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            pytest.skip("transformers has `sanitize_control_tokens` since 5.20")
        for text in ("</s>", "<|im_end|>", "3<think>7"):
            messages = [{"role": "user", "content": text}]
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, sanitize_control_tokens=True
            )["input_ids"]
            assert encode_around(tokenizer, text, self.render(tokenizer)) == expected

    def test_a_template_that_drops_a_token_leaves_no_mark(self):
        tokenizer = byte_level()
        tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'].split('</s>')[0] }}<|im_end|>"
        found = encode_around(tokenizer, "a<|im_end|>b</s>c", self.render(tokenizer))
        assert tokenizer.decode(found) == "<|im_start|>a<|im_end|>b<|im_end|>"
        assert tokenizer.convert_ids_to_tokens(found).count("<|im_end|>") == 1

    def test_a_token_in_front_of_every_text(self):
        tokenizer = byte_level()
        bos = tokenizer.convert_tokens_to_ids("</s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", bos)]
        )
        found = encode_around(tokenizer, "1</s>", "Q: {}".format, add_special_tokens=True)
        assert found == [bos, *plain(tokenizer, "Q: 1</s>")] and found.count(bos) == 1


class TestClock:
    @pytest.mark.parametrize("template", [LLAMA, GPT, INDIRECT])
    def test_the_given_date_is_used(self, template, on_day):
        """The reference is the template itself, run on that day."""
        tokenizer = byte_level()
        tokenizer.chat_template = template
        messages = [{"role": "user", "content": "1+1?"}]
        assert uses_clock(template) and not uses_clock(dated_template(template, "2024-07-26"))
        for day in ("2024-07-26", "2025-03-04", "1999-12-31"):
            on_day(day)
            with pytest.warns(UserWarning, match="today's date .*`chat_template_date`"):
                expected = render_chat(tokenizer, messages, None, None)
            for other in ("2031-01-01", "2000-02-29"):
                on_day(other)
                assert render_chat(tokenizer, messages, None, day) == expected
                assert render_chat(tokenizer, messages, None, other) != expected

    def test_a_template_without_a_clock_is_unchanged(self, recwarn):
        tokenizer = byte_level()
        messages = [{"role": "user", "content": "1+1?"}]
        assert render_chat(tokenizer, messages, None, None) == render_chat(tokenizer, messages, None, "2001-01-01")
        assert not uses_clock(CHAT) and not uses_clock("{# strftime_now('%Y') #}strftime_now") and not list(recwarn)

    @pytest.mark.parametrize("template", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
    def test_a_random_template_is_refused(self, template):
        tokenizer = byte_level()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="Set .* `tokenizer.chat_template`"):
            render_chat(tokenizer, [], None, "2024-07-26")


class TestVariables:
    def test_they_reach_the_template(self):
        tokenizer = byte_level()
        tokenizer.chat_template = GPT
        messages = [{"role": "user", "content": "1+1?"}]
        assert "high 1+1?" in render_chat(tokenizer, messages, {"effort": "high"}, "2024-07-26")
        tokenizer.chat_template = LLAMA
        assert "Date: May 1\n" in render_chat(tokenizer, messages, {"date_string": "May 1"}, "2024-07-26")

    def test_a_variable_missing_from_the_template_is_refused(self):
        """transformers ignores it, so the policy would think although thinking was turned off."""
        tokenizer = byte_level()
        tokenizer.chat_template = GPT
        with pytest.raises(ValueError, match="sets enable_thinking.* effort"):
            render_chat(tokenizer, [], {"enable_thinking": False}, "2024-07-26")

    def test_named_templates(self):
        tokenizer = byte_level()
        tokenizer.chat_template = {"default": GPT, "tool_use": "{{ tools }}<call>"}
        text = render_chat(tokenizer, [{"role": "user", "content": "1+1?"}], None, "2024-07-26")
        assert text == "Current date: 2024-07-26 low 1+1?"
        assert "<call>" in control_tokens(tokenizer).values()


def test_saved_and_loaded(tmp_path):
    """The set of control tokens is saved with the tokenizer's files."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a<|im_end|><｜User｜><think>\n\n\n<table>"
    assert control_tokens(loaded) == control_tokens(tokenizer) and plain(loaded, text) == plain(tokenizer, text)
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
