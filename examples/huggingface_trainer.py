"""Trains a small residual network on handwritten digits in fixed point, with Hugging Face's Trainer.

python examples/huggingface_trainer.py
python examples/huggingface_trainer.py --resume runs/huggingface_trainer/checkpoint-220
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import handwriting
from torch.utils.data import TensorDataset
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from cnmix.huggingface import CnmixCallback, prepare


def build_model() -> ResNetForImageClassification:
    """Returns a small residual network for images (N, 1, 8, 8) of ten digits, with new weights."""
    config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def as_examples(data: TensorDataset) -> list[dict[str, object]]:
    """Returns the images by the names of the model's arguments."""
    return [{"pixel_values": image, "labels": label} for image, label in zip(*data.tensors, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of images that are classified right."""
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves after each epoch, and evaluates in float and with the checkpoint's integers."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--opt-level", default="O1", help="O0 (float32), O1, O2 or O3")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a micro-batch, in each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step of the optimizer")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/huggingface_trainer"))
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="a checkpoint to go on from")
    args = parser.parse_args(argv)

    train_data, test_data = handwriting.load()
    arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=450,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=40,
        weight_decay=0.05,
        max_grad_norm=1.0,
        seed=args.seed,
        save_strategy="epoch",
        eval_strategy="epoch",
        logging_strategy="epoch",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model_init=build_model,  # or model=..., such as what from_pretrained returned
        args=arguments,
        train_dataset=as_examples(train_data),
        eval_dataset=as_examples(test_data),
        compute_metrics=accuracy,
        callbacks=[CnmixCallback(opt_level=args.opt_level)],
    )
    trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)
    trainer.save_model()
    trainer.save_state()  # the quantizers' state, beside the weights
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.2%}, {args.output}")
    if args.opt_level != "O0":
        integers = prepare(ResNetForImageClassification.from_pretrained(args.output), args.output)
        evaluation = Trainer(integers, arguments, eval_dataset=as_examples(test_data), compute_metrics=accuracy)
        print(f"with the checkpoint's integers {evaluation.evaluate()['eval_accuracy']:.2%}")


if __name__ == "__main__":
    main()
