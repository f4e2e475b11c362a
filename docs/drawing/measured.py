"""What the library comes to: pictures of the benchmarks' result files."""

from __future__ import annotations

from matplotlib.figure import Figure

from .common import BLACK, WIDTHS, canvas, picture, result


@picture
def training_speed() -> Figure:
    """Whole training steps against eager float32."""
    networks = {
        "mlp": "MLP, 3 × 2048",
        "bert": "BERT-base, 4 layers",
        "gpt": "GPT, 6 blocks",
        "resnet18": "ResNet-18, 64 × 64",
        "mnist": "MNIST network",
    }
    arms = {"bfloat16": ("bfloat16 autocast", "#bdbdbd"), "torchao_compiled": ("torchao int8, compiled", "#7f7f7f")}
    arms |= {"cnmix_adaptive": ("cnmix O1", WIDTHS[16]), "cnmix_o3": ("cnmix O3", WIDTHS[31])}
    measured = result("training_step")["networks"]
    figure, axes = canvas(7.6, 4.3)
    for row, network in enumerate(networks):
        for place, (arm, (_, colour)) in enumerate(arms.items()):
            speed = measured[network][arm]["speedup"]
            y = row + (place - 1.5) * 0.2
            axes.barh(y, speed, 0.18, color=colour, label=arms[arm][0] if row == 0 else None)
            axes.text(speed + 0.04, y, f"{speed:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=BLACK, linewidth=0.8)
    axes.set(yticks=range(len(networks)), yticklabels=networks.values(), xlim=(0, 6), xlabel="speed, eager float32 = 1")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return figure


@picture
def inference_speed() -> Figure:
    """ResNet-50's integer inference against eager float32 and onnxruntime."""
    case = result("inference")["cases"]["ResNet-50, 16 × 3 × 224 × 224"]
    arms = {
        "float32": "eager float32",
        "bfloat16": "bfloat16 autocast, channels last",
        "ort_float32": "onnxruntime float32",
        "ort_int8": "onnxruntime int8",
        "cnmix_offline": "cnmix offline model",
        "cnmix_fused": "cnmix fused",
    }
    figure, axes = canvas(7.6, 2.6)
    for row, (arm, name) in enumerate(arms.items()):
        speed, seconds = case[arm]["speedup"], case[arm]["seconds"]["median"]
        axes.barh(row, speed, 0.62, color=WIDTHS[16] if name.startswith("cnmix") else "#bdbdbd")
        axes.text(speed + 0.1, row, f"{speed:.1f} ×  ({seconds * 1e3:.0f} ms)", va="center", fontsize=9)
        axes.text(-0.1, row, name, va="center", ha="right")
    axes.set(yticks=[], xlim=(0, 18), xlabel="speed, eager float32 = 1; 16 images of 224 × 224")
    axes.invert_yaxis()
    return figure
