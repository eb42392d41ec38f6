"""transformers' common tests on the classes here; `make test-upstream` fetches them. Not a part of the suite."""

import sys
import types
import unittest.mock
from pathlib import Path

import torch
from transformers import Qwen2Config, SiglipVisionConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexModel, TokenFlexProcessor
from tokenflex.towers.tiny import tiny_model_and_processor


def stand_in(name, **attributes):
    """For a module that transformers' distribution leaves out."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


IMAGE = str(Path(__file__).parents[2] / "docs/choosing.png")
stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url, *_, **__: IMAGE)
stand_in("transformers_tests.exporters")
stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=object)
stand_in("transformers_tests.generation")
stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=object)

from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from transformers_tests.test_processing_common import ProcessorTesterMixin  # noqa: E402


# By these names the common tests tell which class takes labels.
MODEL_MAPPING_NAMES["tokenflex"] = "TokenFlexModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["tokenflex"] = "TokenFlexForConditionalGeneration"


class ModelTester:
    """Two prompts of one image each, at 4 tokens, with some text behind it."""

    batch_size, seq_length, num_vision_tokens, image_token_id = 2, 11, 4, 2
    vision_config = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text_config = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    # Read by the common tests.
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def get_config(self):
        return TokenFlexConfig(
            vision_config=SiglipVisionConfig(**self.vision_config),
            text_config=Qwen2Config(**self.text_config),
            image_token_id=self.image_token_id,
            num_vision_tokens=self.num_vision_tokens,
            vision_token_choices=[self.num_vision_tokens, 16],
            vision_token_weights=[0.5, 0.5],
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = self.vision_config["image_size"]
        first = self.image_token_id + 1
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.text_config["vocab_size"] - first) + first
        input_ids[:, 1 : 1 + self.num_vision_tokens] = self.image_token_id
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, size, size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return config, inputs


class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (TokenFlexModel, TokenFlexForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = ModelTester()
        # Some of these tests leave the images of a prompt out, or draw its ids at random, which `forward` refuses.
        self.enterContext(unittest.mock.patch("tokenflex.modeling_tokenflex.first_placeholders"))


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TokenFlexProcessor

    @classmethod
    def _setup_image_processor(cls):
        return tiny_model_and_processor()[1].image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_model_and_processor()[1].tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"num_vision_tokens": 36, "patch_size": 8, "chat_template": tiny_model_and_processor()[1].chat_template}

    def prepare_videos_inputs(self):
        """None: some tests give videos to every processor."""

    @unittest.skip("A processor's counts and crops are defaults that a call may override.")
    def test_init_arguments_not_in_processor_kwargs(self):
        pass


del ModelTesterMixin, ProcessorTesterMixin  # imported to be inherited, not to be run
