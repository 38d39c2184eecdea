"""The demo's tokenizer."""

from examples.demo.small_model import EOS_ID, byte_tokenizer


def test_a_token_is_a_byte():
    text = "def é(x):\n    return '→'"
    tokenizer = byte_tokenizer()
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_the_end_of_a_file_has_its_own_token():
    assert byte_tokenizer()("a<eos>")["input_ids"] == [ord("a"), EOS_ID]
