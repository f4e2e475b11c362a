import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import cnmix
from cnmix.huggingface import CnmixCallback, prepare
from cnmix.nn import quantized_modules


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=17, max_position_embeddings=8, num_labels=3))


def examples(count=22):
    tokens = torch.randint(0, 17, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each, "labels": torch.tensor(number % 3)} for number, each in enumerate(tokens)]


def make_trainer(folder, callback, model=None, **changes):
    """Returns a trainer with six micro-batches, and three steps, in an epoch."""
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    data = {"train_dataset": examples(), "eval_dataset": examples(5)}
    model = {"model_init": bert} if model is None else {"model": model}
    callbacks = [] if callback is None else [callback]
    return Trainer(**model, args=arguments, callbacks=callbacks, **data)


def saved_state(folder):
    callbacks = json.loads((Path(folder) / "trainer_state.json").read_text())["stateful_callbacks"]
    return callbacks["CnmixCallback"]["attributes"]["cnmix"]


def plain(value):
    return json.loads(json.dumps(value))


def test_converts_in_place_and_takes_the_steps_from_the_loader(tmp_path):
    model = bert()
    parameters, names = list(model.parameters()), list(model.state_dict())
    trainer = make_trainer(tmp_path, CnmixCallback(exclude=["classifier"], threshold=0.2), model, save_strategy="no")
    linear = [name for name, module in bert().named_modules() if isinstance(module, nn.Linear)]
    assert [name for name, _ in quantized_modules(model)] == linear[:-1]
    trainer.train()
    for _, module in quantized_modules(model):
        assert module.quantizers.config.steps_per_epoch == 6  # micro-batches
        assert module.quantizers.config.threshold == 0.2
        assert module.quantizers.input.state.step == 12
    assert all(ours is before for ours, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names


def test_equals_a_loop_of_ones_own(tmp_path, same_weights):
    model = bert()
    trainer = make_trainer(tmp_path, CnmixCallback(), model, save_strategy="no", max_grad_norm=0.1)
    trainer.train()
    ours = bert()
    optimizer = make_trainer(tmp_path, None, ours, save_strategy="no").create_optimizer()
    cnmix.initialize(ours, optimizer, steps_per_epoch=6)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 6)
    loader = make_trainer(tmp_path, None, bert()).get_train_dataloader()
    torch.manual_seed(42)  # of TrainingArguments
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        for pair in (batches[:2], batches[2:4], batches[4:]):
            count = sum(len(batch["labels"]) for batch in pair)
            ours.train()
            for batch in pair:
                if trainer.model_accepts_loss_kwargs:
                    loss = ours(**batch, num_items_in_batch=torch.tensor(count)).loss
                else:
                    loss = ours(**batch).loss / len(pair)
                loss.backward()
            nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            ours.zero_grad()
    assert cnmix.state_dict(model) == cnmix.state_dict(ours)
    assert same_weights(model, ours)


SETTINGS = {
    "O0": {"opt_level": "O0"},
    "O1": {},
    "O2": {"opt_level": "O2"},
    "stochastic": {"opt_level": "O3", "rules": [{"types": nn.Linear, "rounding": "stochastic"}]},
}


@pytest.mark.parametrize("from_saved_arguments", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_resuming_within_an_epoch_is_bit_equal(tmp_path, same_weights, settings, from_saved_arguments):
    given = SETTINGS[settings]
    whole = make_trainer(tmp_path / "whole", CnmixCallback(**given))
    whole.train()
    resumed = make_trainer(
        tmp_path / "resumed", CnmixCallback(**given), restore_callback_states_from_checkpoint=from_saved_arguments
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert same_weights(whole.model, resumed.model)
    assert saved_state(tmp_path / "whole" / "checkpoint-6") == saved_state(tmp_path / "resumed" / "checkpoint-6")
    assert plain(cnmix.state_dict(whole.model)) == saved_state(tmp_path / "whole" / "checkpoint-6")
    assert cnmix.state_dict(whole.model) == cnmix.state_dict(resumed.model)


def test_evaluation_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, CnmixCallback(), bert(), save_strategy="no")
    trainer.train()
    before = cnmix.state_dict()
    trainer.evaluate()
    trainer.predict(examples(3))
    assert cnmix.state_dict() == before


def test_integers_from_a_checkpoint_and_from_the_final_folder(tmp_path):
    trainer = make_trainer(tmp_path, CnmixCallback("O2"), save_only_model=True)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    tokens = torch.stack([each["input_ids"] for each in examples()])
    for folder in (tmp_path / "checkpoint-6", tmp_path):
        plain_model = BertForSequenceClassification.from_pretrained(folder)
        assert not any(quantized_modules(plain_model))
        model = prepare(plain_model, folder)
        assert all(module.quantizers.frozen for _, module in quantized_modules(model))
        with torch.no_grad():
            assert torch.allclose(model(tokens).logits, trainer.model.eval()(tokens).logits, atol=2e-2)


def test_the_best_model_brings_its_state(tmp_path):
    # The learning rate rises until the loss is worse than at first.
    changes = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 2.0, "warmup_steps": 6}
    trainer = make_trainer(
        tmp_path, CnmixCallback(), load_best_model_at_end=True, metric_for_best_model="loss", **changes
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-6")
    assert plain(cnmix.state_dict(trainer.model)) == saved_state(best)
    trainer.save_state()
    assert saved_state(tmp_path) == saved_state(best)


def test_a_callback_added_later_and_a_second_training(tmp_path):
    model = bert()
    trainer = make_trainer(tmp_path, None, model, save_strategy="no")
    trainer.add_callback(CnmixCallback(steps_per_epoch=100))
    trainer.train()
    trainer.train()
    for _, module in quantized_modules(model):
        assert module.quantizers.input.state.step == 24
        assert module.quantizers.config.steps_per_epoch == 100


def test_data_without_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples())

    model = bert()
    trainer = make_trainer(tmp_path, CnmixCallback(), model, save_strategy="no", max_steps=2)
    trainer.train_dataset = Stream()
    trainer.train()
    assert {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)} == {10_000}


def test_a_loss_computed_within_the_model_is_of_float32(tmp_path):
    model = bert()
    make_trainer(tmp_path, CnmixCallback("O2"), model)
    batch = torch.utils.data.default_collate(examples())
    output = model(**batch)
    assert output.loss == nn.functional.cross_entropy(output.logits, batch["labels"])
    assert output.loss != output.loss.bfloat16()


@pytest.mark.parametrize("flag", ["bf16", "bf16_full_eval", "fp16_full_eval"])
def test_the_trainers_own_half_precision_is_refused(tmp_path, monkeypatch, flag):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # older transformers write there
    with pytest.raises(ValueError, match=f"{flag}=True and cnmix would both"):
        make_trainer(tmp_path, CnmixCallback(), bert(), **{flag: True})


def test_mixed_precision_from_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=bf16 and cnmix would both"):
        make_trainer(tmp_path, CnmixCallback(), bert())


def test_wrong_arguments_are_refused_where_they_are_written():
    with pytest.raises(ValueError, match="float16 needs a loss scale"):
        CnmixCallback(activation_dtype=torch.float16)
    with pytest.raises(ValueError, match="opt_level"):
        CnmixCallback("O9")
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        CnmixCallback(treshold=0.1)
    with pytest.raises(ValueError, match="would have no effect"):
        CnmixCallback("O0", rules=[{"types": "Linear", "width": 16}])


def test_resuming_at_another_level_is_refused(tmp_path):
    make_trainer(tmp_path, CnmixCallback("O2"), bert()).train()
    resumed = make_trainer(tmp_path, CnmixCallback("O1"), bert())
    with pytest.raises(ValueError, match="was trained at opt_level 'O2', and CnmixCallback has 'O1'"):
        resumed.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_state(tmp_path, caplog):
    make_trainer(tmp_path, None, bert(), num_train_epochs=1).train()
    with pytest.raises(ValueError, match="has no cnmix state: it is not of a Trainer with CnmixCallback"):
        prepare(BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3"), tmp_path / "checkpoint-3")
    with pytest.raises(FileNotFoundError, match="give a checkpoint folder of the Trainer"):
        prepare(bert(), tmp_path)
    resumed = make_trainer(tmp_path, CnmixCallback(), bert())
    resumed.train(resume_from_checkpoint=True)
    assert "has no cnmix state: its quantizers start anew" in caplog.text
    assert all(module.quantizers.input.state.step == 6 for _, module in quantized_modules(resumed.model))
