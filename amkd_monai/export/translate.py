"""Turn the transforms of a training bundle into MONAI's own, and into the steps of prediction without MONAI."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from monai import transforms
from monai.utils import BlendMode, ensure_tuple, ensure_tuple_rep

from amkd_monai.data.transforms import CtWindowd
from amkd_monai.files.steps import BACKGROUND_LEVEL, LEAST_PART
from amkd_monai.files.volumes import BRIGHTEST, HIGHEST_MINIMUM, LOWEST_AIR

Config = dict[str, Any]
Translated = tuple[list[Config], list[Config]]
"""Transforms for ``inference.json``, and steps for ``predict.json``."""

_GREY = (
    "(lambda v: (np.testing.assert_array_less([-1e-9, v.max()], [v.min(), 65535.5], 'levels without a scale'), "
    "(v * 255 if v.dtype.kind == 'f' and v.max() <= 1 else v.astype(np.float64) * 255 / "
    "[w for w in (255, 4095, 65535) if v.max() <= w][0] + (0 if v.dtype.kind == 'f' else -0.49999)))[1].round()"
    ".astype(np.uint8))(np.asarray(image))"
)
_ALPHA = "image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info"
_RGB = (
    "$lambda image: (lambda image: Image.alpha_composite(Image.new('RGBA', image.size, (0, 0, 0, 255)), "
    f"image.convert('RGBA')).convert('RGB') if {_ALPHA} else image.convert('RGB'))"
    f"((lambda image: Image.fromarray({_GREY}) if image.mode[0] in 'IF' else image)"
    "((setattr(image, 'filename', ''), image.load(), ImageOps.exif_transpose(image))[2]))"
)
"""``files.pictures.read_picture`` in one expression, as an exported bundle runs by MONAI alone."""
_NEIGHBOURS = (
    "$lambda v: torch.cat([p for c in v.split(1) for p in (torch.cat([c[:, :1], c[:, :-1]], 1), c, "
    "torch.cat([c[:, 1:], c[:, -1:]], 1))], 0)"
)
_SQUARE = (
    "$lambda v: torch.nn.functional.pad(v, [(max(v.shape[1:]) - v.shape[2]) // 2, "
    "(max(v.shape[1:]) - v.shape[2] + 1) // 2, (max(v.shape[1:]) - v.shape[1]) // 2, "
    "(max(v.shape[1:]) - v.shape[1] + 1) // 2])"
)
_DISC = (
    "$lambda v: (lambda m: (lambda r, c: ((r if r.any() else ~r)[:, None] & (c if c.any() else ~c)[None])[None])"
    "(m.double().mean(1) > {part}, m.double().mean(0) > {part}))"
    "(torch.as_tensor(v).amax(0) > {level} * max(float(v.max()), 1e-6))"
)
_MILLIMETRES = (
    "$lambda v: (lambda m, a: (np.testing.assert_equal([v.ndim, bool(v.isfinite().all())], [4, True], 'no volume'), "
    "np.testing.assert_array_less(0, int(m['sform_code']) + int(m['qform_code']), 'no orientation'), "
    "(lambda b: type(v)(v.as_tensor(), meta={**m, 'original_affine': b, 'original_channel_dim': float('nan')}, "
    "affine=b))(torch.cat([torch.cat(["
    "a[:3, :3] / a[:3, :3].norm(dim=0) * a[:3, :3].norm(dim=0).round(decimals=6), a[:3, 3:]], 1), a[3:]])))[-1])"
    "(v.meta, torch.diag(torch.tensor([*[{0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}[int(v.meta['xyzt_units']) & 7]] * 3, "
    "1.0], dtype=v.affine.dtype)).matmul(v.affine))"
)
"""Affines in mm, as ``files.volumes.volume_grid`` gives them, after the checks that MONAI's reader leaves out."""

_UNIT_RANGE = {"b_min": 0.0, "b_max": 1.0, "clip": True}
_LINEAR = {"mode": "bilinear"}
_SHARES = {key: key for key in ("lower", "upper", "channel_wise")}
OF_MONAI: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "Orientationd": ("orientation", {"labels": None}, {"axes": "axcodes"}),
    "ScaleIntensityRanged": ("scale", _UNIT_RANGE, {"low": "a_min", "high": "a_max"}),
    "ScaleIntensityRangePercentilesd": ("scale_percentiles", _UNIT_RANGE, _SHARES),
    "Resized": ("resize", _LINEAR, {"size": "spatial_size", "anti_aliasing": "anti_aliasing"}),
    "Spacingd": ("spacing", _LINEAR, {"pixdim": "pixdim"}),
    "CenterSpatialCropd": ("crop", {}, {"size": "roi_size"}),
    "SpatialPadd": ("pad", {}, {"size": "spatial_size"}),
}
"""MONAI's transforms by ``_target_``: the step, settings that must have a value, and the settings of the step."""

ANSWERING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Activationsd": ({"softmax": True}, ()),
    "Invertd": ({"nearest_interp": False}, ("transform", "orig_keys", "to_tensor")),
    "AsDiscreted": ({"argmax": True}, ()),
    "KeepLargestConnectedComponentd": ({}, ("applied_labels",)),
    "CastToTyped": ({}, ("dtype",)),
    "SaveMaskd": ({}, ("output_dir", "classes")),
    "SqueezeDimd": ({}, ("dim",)),
}
"""What prediction does to an answer, in this order: settings that must have a value, and those that may have any."""

_WHOLE = ("SimpleInferer", "SliceInferer")


def _check(name: str, settings: Mapping[str, Any], required: Mapping[str, Any], free: Sequence[str]) -> None:
    """Refuse settings that prediction does not repeat: other than the required ones, or else than MONAI's defaults."""
    known = inspect.signature(getattr(transforms, name, object)).parameters
    others = {key for key in settings if key not in ("_target_", "keys", "allow_missing_keys", "dtype", *free)}
    defaults = {key: known[key].default if key in known else None for key in others}
    for key, value in {**defaults, **required}.items():
        if (given := settings.get(key)) != value:
            raise ValueError(f"{name} has {key} {given!r}, which cannot be exported: use {value!r}.")


def preprocessing(target: str, settings: Mapping[str, Any], several: bool = False) -> Translated:
    """Translate one transform of an image, perhaps of several files; what cannot be repeated is a ValueError."""
    name = target.removeprefix("amkd_monai.data.transforms.")
    if "_disabled_" in settings:
        raise ValueError(f"{name} has _disabled_, which cannot be exported: take it out of the config.")
    if name in OF_MONAI:
        step, required, keys = OF_MONAI[name]
        _check(name, settings, required, [*keys.values()])
        values = {"anti_aliasing": False, "channel_wise": False, **settings}
        return [{"_target_": name, **settings}], [{"step": step, **{key: values[of] for key, of in keys.items()}}]
    if name == "load_rgb":
        converter = f"{_RGB}.convert('L')" if several else _RGB
        return [_loading("PILReader", reverse_indexing=False, converter=converter)], []
    if name == "load_volume":
        return [_loading("NibabelReader", squeeze_non_spatial_dims=True), _changing(_MILLIMETRES)], []
    if name == "NeighbourSlicesd":
        return [_changing(_NEIGHBOURS)], [{"step": "neighbours"}]
    if name == "CropFundusd":
        select = _DISC.format(level=BACKGROUND_LEVEL, part=LEAST_PART)
        crop = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "select_fn": select}
        levels = {"background_level": BACKGROUND_LEVEL, "least_part": LEAST_PART}
        return [crop, _changing(_SQUARE)], [{"step": "crop_disc", **levels}]
    if name == "CtWindowd":
        window = CtWindowd(**settings)
        ends: Config = {"low": float(window.low), "high": float(window.high), "values": window.values}
        return [_changing(_windowed(**ends))], [{"step": "ct_window", **ends}]
    known = ", ".join([*OF_MONAI, "load_rgb", "load_volume", "NeighbourSlicesd", "CropFundusd", "CtWindowd"])
    raise ValueError(f"The preprocessing holds {target}, which cannot be exported: use {known}.")


def _loading(reader: str, **options: Any) -> Config:
    return {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "reader": reader, **options}


def _changing(function: str) -> Config:
    return {"_target_": "Lambdad", "keys": "image", "func": function}


def _windowed(low: float, high: float, values: str) -> str:
    """``files.volumes.ct_range`` in one expression."""
    ends = {"hu": f"({low}, {high})", "levels": "(0, 255)", "shares": "(0, 1)"}
    auto = (
        f"{ends['hu']} if v[v >= {LOWEST_AIR}].min() <= {HIGHEST_MINIMUM} else [e for e in ((0, 1), (0, 255)) "
        f"if v.min() >= 0 and {BRIGHTEST} * e[1] <= v.max() <= e[1]][0]"
    )
    return f"$lambda v: (lambda e: ((v - e[0]) / (e[1] - e[0])).clip(0, 1))({ends.get(values, auto)})"


def window(inferer: Mapping[str, Any], is_3d: bool) -> Config | None:
    """Settings of :func:`amkd_monai.export.windows.slide` of an inferer, None for whole slices; else a ValueError."""
    name, known = str(inferer["_target_"]).rpartition(".")[2], ("SlidingWindowInferer",) if is_3d else _WHOLE
    if name not in known:
        of = "3D student" if is_3d else "student of pictures or slices"
        raise ValueError(f"The inferer is {name}, which cannot be exported of a {of}: use {' or '.join(known)}.")
    if not is_3d:
        return None
    given = {"overlap": 0.25, "mode": "constant", "sigma_scale": 0.125, **inferer}
    for key, value in {"padding_mode": "constant", "cval": 0.0, "with_coord": False}.items():
        if (found := given.get(key, value)) != value:
            raise ValueError(f"{name} has {key} {found!r}, which cannot be exported: use {value!r}.")
    found = {key: [*ensure_tuple_rep(given[key], 3)] for key in ("roi_size", "overlap", "sigma_scale")}
    if min(found["roi_size"]) < 1:
        raise ValueError(f"{name} has roi_size {found['roi_size']}: give the size of a patch.")
    return found | {"mode": str(BlendMode(given["mode"]))}


def postprocessing(answers: Sequence[Mapping[str, Any]], is_mask: bool, dimensions: int) -> list[Config]:
    """Translate the transforms of an answer of 2 or 3 dimensions; what prediction does not repeat is a ValueError."""
    names = [str(transform["_target_"]).removeprefix("amkd_monai.data.transforms.") for transform in answers]
    known = [*ANSWERING] if is_mask else ["Activationsd"]
    if names != [name for name in known if name in names or ANSWERING[name][0]]:
        what = f"The postprocessing does {', '.join(names)}, which cannot be exported"
        raise ValueError(f"{what}: use {', '.join(known)}, in this order.")
    result = []
    for name, transform in zip(names, answers, strict=True):
        _check(name, transform, *ANSWERING[name])
        if name.startswith("KeepLargest") and {*map(type, ensure_tuple(transform.get("applied_labels")))} != {int}:
            raise ValueError(f"{name} has applied_labels that cannot be exported: write the numbers of classes.")
        result += _saving(transform, dimensions) if name == "SaveMaskd" else [dict(transform)]
    return result


def _saving(transform: Mapping[str, Any], dimensions: int) -> list[Config]:
    save = {
        **{"_target_": "SaveImaged", "keys": transform["keys"], "output_dir": transform["output_dir"]},
        **{"output_postfix": "mask", "output_ext": ".png" if dimensions == 2 else ".nii.gz"},
        **{"output_dtype": "$torch.uint8", "resample": False, "separate_folder": False, "print_log": False},
    }
    if dimensions == 3:
        return [save]
    turned = {"_target_": "Transposed", "keys": transform["keys"], "indices": [0, 2, 1]}
    return [turned, save if transform.get("classes", 2) > 2 else {**save, "scale": 255}]
