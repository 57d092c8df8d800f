"""The model card of an exported student, from what its run recorded."""

from __future__ import annotations

from typing import Any

from amkd_monai.export.source import Source

_UNKNOWN = "not recorded: the run left no run.json"


def model_card(source: Source, facts: dict[str, Any], name: str, images: str) -> str:
    """Return ``docs/README.md``.

    Args:
        source: the opened training bundle.
        facts: what was measured at the export.
        name: of the exported bundle's folder.
        images: what an image is and how it is prepared.
    """
    about = source.metadata
    notice = (
        "\n**This student was trained on generated phantoms: a demonstration, not a result.**\n"
        if source.is_phantom
        else ""
    )
    if note := source.record.get("data", {}).get("stand_in"):
        notice += f"\n**This student was trained on data that stand in for others: {note}**\n"
    return f"""# {about["name"]}

{about["description"]}
{notice}
**Research only. NOT FOR CLINICAL USE.**

## Model Description

- Task: {about["task"]}
- Input: {images}
- Output: {about["pred_classes"]}
- Parameters: {sum(p.numel() for p in source.student.parameters()):,}
- Calibration: {_calibration(source)}

## Data

- Source: {about["data_source"]}
- Samples: {_samples(source)}
- Hash of the split: {source.record.get("data", {}).get("split_hash", _UNKNOWN)}
- Licences of data and packaged weights: `data_license.txt`. \
A student may be used only as the licences of its data and of its teachers allow.

### Teachers

{_teachers(source)}

## Performance

{_performance(source)}

### Formats

{_formats(facts, source.task.is_classification)}

## Use

```bash
python -m monai.bundle run --config_file {name}/configs/inference.json --bundle_root {name} \\
  --dataset_dir IMAGES --output_dir OUT
python -m amkd_monai predict --model {name} IMAGES --output OUT    # ONNX Runtime, without torch
```

The first command needs MONAI alone. The ONNX file takes `image`, \
float32 in [0, 1], (B, 3, H, W), height and width divisible \
by 32, and gives logits `pred`.

## Intended Use

{about["intended_use"]} For comparison and further research on data like those it was trained on.

## Limitations

- One data source; other devices, hospitals and populations have not been looked at.
- The answer outside its kind of image is arbitrary, and nothing warns of it.
- It has not been validated for clinical use and must not be used for diagnosis or treatment.

## References

{chr(10).join(f"- {line}" for line in about["references"])}

## License

The files of this bundle are under Apache-2.0, see `LICENSE`; the weights are bound \
by the terms of data and teachers as well.
"""


def _calibration(source: Source) -> str:
    if "temperature" not in source.state:
        return "the probabilities of the mask are not calibrated"
    ece = source.metrics.get("summary", {}).get("metrics", {}).get("ece")
    said = f"logits are divided by a temperature of {float(source.state['temperature']):.3f}, fitted on validation"
    return said + (f"; expected calibration error on test {_interval(ece, 'value')}" if ece else "")


def _samples(source: Source) -> str:
    counts = source.record.get("data", {}).get("counts")
    return ", ".join(f"{k} {v}" for k, v in counts.items()) if counts else _UNKNOWN


def _teachers(source: Source) -> str:
    distillation = source.record.get("distillation")
    if distillation is None:
        return f"- {_UNKNOWN}"
    teachers = distillation.get("teachers", []) if isinstance(distillation, dict) else []
    lines = [
        f"- {t['name']} ({t.get('kind', 'unknown kind')}): licence {t.get('licence') or 'not stated'}" for t in teachers
    ]
    return "\n".join(lines) or "- none: trained with labels alone"


def _performance(source: Source) -> str:
    summary = source.metrics.get("summary")
    if not summary:
        return f"Not evaluated: {source.unscored or 'the run has no metrics.json'}."
    lines = ["| metric | value | 95 % interval |", "| --- | --- | --- |"]
    for name, value in summary["metrics"].items():
        key = "mean" if "mean" in value else "value"
        cells = [_number(value.get(k)) for k in (key, "ci_low", "ci_high")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} to {cells[2]} |")
    return f"Test section, {summary['cases']} cases, bootstrap over cases:\n\n" + "\n".join(lines)


def _formats(facts: dict[str, Any], is_classification: bool) -> str:
    metric = "macro AUC" if is_classification else "Dice"
    lines = [
        f"Against the PyTorch student (eager) on {len(facts['validation_cases'])} validation images, at the network's "
        f"resolution; latency of one image on the CPU, threads: {facts['threads']}; peak memory of a fresh "
        "process that answers one image.",
        "",
        f"| format | MB | p50 ms | p95 ms | peak MB | largest difference of a probability | {metric} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in facts["formats"]:
        sizes = " | ".join(f"{row[key]:.1f}" for key in ("megabytes", "p50", "p95"))
        memory = _number(row["memory"], 0)
        lines.append(f"| {row['name']} | {sizes} | {memory} | {row['difference']:.1e} | {_number(row['metric'])} |")
    if facts["calibration_images"]:
        count = len(facts["calibration_images"])
        lines += ["", f"8 bits were calibrated on {count} training images, named in `export.json`."]
    return "\n".join(lines + [f"\n{remark}" for remark in facts["remarks"]])


def _interval(value: dict[str, Any], key: str) -> str:
    return f"{_number(value.get(key))} ({_number(value.get('ci_low'))} to {_number(value.get('ci_high'))})"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
