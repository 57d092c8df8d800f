"""Undistilled against distilled students at equal budget, on real data: the figures of docs/results.md.

python benchmarks/results.py --shared ../shared --jobs 2 --seeds 6   # all settings, resumable
python benchmarks/results.py --shared ../shared --only "heart*"
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bundle_runner import BEST, BEST_MASKS, Setting, main, options

SPECIALIST = {"name": "kvasir_specialist", "kind": "specialist", "image_size": 256, "licence": "research only"}
# an epoch is all images once, at least 8 steps for classes, as it was by default when these rows began
SHORT, SHORT_CLASSES = {"recipe#min_steps": 1}, {"recipe#min_steps": 8}
KVASIR = {"image_size": 128, "split_fractions": [0.5, 0.1, 0.4], "val_interval": 4, **SHORT, **BEST_MASKS}
COMPARED = [{"name": f"imagenet_lite{n}", "kind": "timm", "model": f"tf_efficientnet_lite{n}"} for n in (1, 2)]
FEATURES_ONLY = {"admission": {"mode": "none"}}  # what cross-fitted admission decides for the ImageNet teachers
LONG = {**KVASIR, "max_epochs": 60}
HEART = dict(BEST_MASKS)
HEART_DATA = "MSD-Heart/Task02_Heart_half"
HEART_FOLD = (2,)  # of five; the learning rate was chosen on folds 0 and 1
HEART_FOLDS = (0, 1, 2, 3, 4)
FOLD_OF_THREE = {"folds": 3, "val_interval": 2}
SMALL = {  # the other bundles: data, what differs from the bundle's own defaults
    "busi": ("BUSI/Dataset_BUSI_with_GT", {**FOLD_OF_THREE, **SHORT, **BEST_MASKS, "image_size": 128}),
    "covid": ("COVID", {**KVASIR, "val_interval": 2, "max_epochs": 80}),
    "aptos2019": ("APTOS2019_standin_IDRiD", {**FOLD_OF_THREE, **SHORT_CLASSES, **BEST, "image_size": 224}),
    "isic2017": ("ISIC2017", {"image_size": 160, **SHORT_CLASSES, **BEST}),
}
SETTINGS = {
    "kvasir_12_undistilled": Setting("kvasir_seg", "Kvasir-SEG", {**LONG, "labelled": 12}, teachers=[]),
    "kvasir_12_specialist": Setting(
        "kvasir_seg", "Kvasir-SEG", {**LONG, "labelled": 12}, "kvasir_12_undistilled", teachers=[SPECIALIST]
    ),
    "kvasir_all_undistilled": Setting("kvasir_seg", "Kvasir-SEG", LONG, teachers=[]),
    "kvasir_all_default": Setting("kvasir_seg", "Kvasir-SEG", {**LONG, **FEATURES_ONLY}, "kvasir_all_undistilled"),
    "heart_five_folds_undistilled": Setting("msd_heart", HEART_DATA, HEART, teachers=[], folds=HEART_FOLDS, seeds=1),
    "heart_undistilled": Setting("msd_heart", HEART_DATA, HEART, teachers=[], folds=HEART_FOLD),
    "heart_default": Setting(
        "msd_heart", HEART_DATA, {**HEART, **FEATURES_ONLY}, "heart_undistilled", folds=HEART_FOLD
    ),
}
for bundle, (data, overrides) in SMALL.items():
    SETTINGS[f"{bundle}_undistilled"] = Setting(bundle, data, overrides, teachers=[])
    compared = COMPARED if bundle in ("aptos2019", "isic2017") else None  # the bundles' own give features only
    SETTINGS[f"{bundle}_default"] = Setting(bundle, data, overrides, f"{bundle}_undistilled", teachers=compared)
# an ensemble on the run's own labels as the teacher; the bundles' defaults in all else
CREW = {"teachers": [{"name": "crew", "kind": "crew"}]}
SMALL_CREW = {"teachers": [{"name": "crew", "kind": "crew", "size": "small"}]}
AT_ONCE = {"recipe#first_stage": 0.0}  # labels and unlabelled images together, from the first step


def by_default(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides without those that keep the best student on validation."""
    return {name: value for name, value in overrides.items() if name not in BEST_MASKS}


for bundle in (*SMALL, "kvasir_all", "kvasir_12", "heart"):
    earlier = SETTINGS[f"{bundle}_undistilled"]
    last = replace(earlier, overrides=by_default(earlier.overrides))
    SETTINGS[f"{bundle}_last"] = replace(last, reference=f"{bundle}_undistilled")
    SETTINGS[f"{bundle}_crew"] = replace(last, reference=f"{bundle}_last", **CREW)
    SETTINGS[f"{bundle}_small_crew"] = replace(last, reference=f"{bundle}_last", **SMALL_CREW)
# crews that teach whether they beat the student or not, of members that learn a third as long
ADMITTED = {"admission": {"mode": "all"}}
SHORT_CREW = {"teachers": [{"name": "crew", "kind": "crew", "size": "small", "folds": 2, "images": 1024}]}
crew_of_12 = SETTINGS["kvasir_12_small_crew"]
few, slices = (
    replace(row, overrides={**row.overrides, **ADMITTED}, **SHORT_CREW)
    for row in (crew_of_12, SETTINGS["covid_small_crew"])
)
# 786 further images, about as many steps as without them; the decision on admission is that of `kvasir_12_small_crew`
WITH_POOL = {**crew_of_12.overrides, **ADMITTED, "max_epochs": 6, "val_interval": 1}
# 481 CT slices of 10 other volumes, as many steps as without them
GROUPS = {"unlabelled_groups": r"(.*)_\d+"}
POOL = {**GROUPS, "max_epochs": 6, "val_interval": 1}
SLICES = "covid/images/*radiopaedia*"
pool = replace(slices, overrides={**slices.overrides, **POOL}, pool=SLICES)
OUTPUT_ALONE = {"losses": {"output": 1.0, "overlap": 0.0, "feature": 0.2}}
LONG_CREW = {"teachers": [{"name": "crew", "kind": "crew", "size": "small", "folds": 2, "images": 3072}]}
# further images without labels, as many steps as without them
FURTHER = {"covid": (SLICES, POOL), "busi": ("busi/images_256/*/*", {"max_epochs": 3})}
FEW = {"covid": 12, "busi": 12, "isic2017": 30, "aptos2019": 24, "heart": 3}
"""Labelled images or volumes; all other training images take part without their labels."""
for bundle, labels in FEW.items():
    last = SETTINGS[f"{bundle}_last"]
    last = replace(last, overrides={**last.overrides, "labelled": labels})
    SETTINGS[f"{bundle}_{labels}_last"] = last
    crew = SETTINGS[f"{bundle}_{labels}_small_crew"] = replace(last, reference=f"{bundle}_{labels}_last", **SMALL_CREW)
    if bundle in FURTHER:
        files, length = FURTHER[bundle]
        overrides = {**crew.overrides, **length}
        SETTINGS[f"{bundle}_{labels}_pool"] = replace(crew, overrides=overrides, pool=files)
# the samples with the labelled images of the pools: a quarter of the training labels, the others without theirs
LARGE = {
    "isic2017": ("isic2017", {"image_size": 160, "max_epochs": 10, "val_interval": 5}, 490),
    "aptos2019": ("idrid", {"image_size": 224, "max_epochs": 30, "val_interval": 5, "folds": 3}, 62),
}
for bundle, (joined, overrides, labels) in LARGE.items():
    overrides = {**overrides, **SHORT_CLASSES, "labelled": labels}
    last = Setting(bundle, SETTINGS[f"{bundle}_last"].data, overrides, teachers=[], joined=joined)
    SETTINGS[f"{bundle}_quarter_last"] = last
    SETTINGS[f"{bundle}_quarter_small_crew"] = replace(last, reference=f"{bundle}_quarter_last", **SMALL_CREW)
# few labels, and runs of several lengths: 8 epochs have 984 steps
lesions = replace(
    SETTINGS["isic2017_quarter_last"], overrides={**LARGE["isic2017"][1], **SHORT_CLASSES, "labelled": 120}
)
for name, epochs in {"246": 2, "492": 4, "last": 8, "3936": 32}.items():
    overrides = {**lesions.overrides, "max_epochs": epochs, "val_interval": 1}
    SETTINGS[f"isic2017_120_{name}"] = replace(lesions, overrides=overrides)
# three labelled volumes, the others of the training section without; every volume is tested once
for name in ("last", "small_crew"):
    row = SETTINGS[f"heart_3_{name}"]
    row = replace(row, folds=HEART_FOLDS, seeds=1, reference=row.reference and "heart_3_five_folds_last")
    SETTINGS[f"heart_3_five_folds_{name}"] = row
# a crew whose members take as many steps as the student
row = replace(SETTINGS["isic2017_120_last"], reference="isic2017_120_last")
as_long = {**SMALL_CREW["teachers"][0], "images": 984 * 8}
SETTINGS["isic2017_120_long_crew"] = replace(row, teachers=[as_long])
# the same students, whose unsure answers are brought nearer to equal classes instead of their frequencies
EQUAL = {"validate#handlers#0#frequencies": "$None"}
last = SETTINGS["aptos2019_quarter_last"]
SETTINGS["aptos2019_quarter_equal"] = replace(
    last, overrides={**last.overrides, **EQUAL}, reference="aptos2019_quarter_last"
)
# all labels and a pool without, about 1000 steps in both rows: files, epochs, steps of one
ALL = {"busi": ("busi/images_256/*/*", 11, 96, {}), "covid": (SLICES, 16, 65, GROUPS)}
for bundle, (files, epochs, steps, own) in ALL.items():
    length = {"max_epochs": epochs, "recipe#min_steps": steps, "val_interval": 1}
    last = SETTINGS[f"{bundle}_last"]
    last = SETTINGS[f"{bundle}_all_last"] = replace(last, overrides={**last.overrides, **length}, reference=None)
    more = {"overrides": {**last.overrides, **own}, "reference": f"{bundle}_all_last"}
    SETTINGS[f"{bundle}_all_pool"] = replace(last, pool=files, **more, **SMALL_CREW)
# all labels and nothing else, at the bundles' present length of 1000 steps
for name in ("kvasir_all", "covid", "busi"):
    length = {"max_epochs": 40, "recipe#min_steps": 25}
    last = SETTINGS[f"{name}_last"]
    last = SETTINGS[f"{name}_1000_last"] = replace(last, overrides={**last.overrides, **length}, reference=None)
    SETTINGS[f"{name}_1000_small_crew"] = replace(last, reference=f"{name}_1000_last", **SMALL_CREW)
# at 2.5 times the length, which validation prefers for CT slices
LONGER = {"covid_12_last": 200, "covid_12_small_crew": 200, "covid_12_pool": 15, "kvasir_all_last": 160}
LONGER |= {"kvasir_12_last": 100, "kvasir_12_small_crew": 100}
for name, epochs in LONGER.items():
    row = SETTINGS[name]
    overrides = {**row.overrides, "max_epochs": epochs, "val_interval": 5}
    reference = row.reference and f"{row.reference}_longer"
    SETTINGS[f"{name}_longer"] = replace(row, overrides=overrides, reference=reference)
# where a crew's gain comes from, whether it is admitted or not: of the student's own size and side; on labels alone
OWN_SIZE = {"size": "small", "members": [{"encoder": "tf_efficientnet_lite0"}], "image_size": 1.0}
for name, steps in {"kvasir_12": 10, "covid_12": 5}.items():
    row = SETTINGS[f"{name}_small_crew_longer"]
    row = replace(row, overrides={**row.overrides, **ADMITTED})
    SETTINGS[f"{name}_own_size_longer"] = replace(row, teachers=[{"name": "crew", "kind": "crew", **OWN_SIZE}])
    alone = {"train#dataset#data": "$@datalist.checked(@on_bad_sample).train", "recipe#min_steps": steps}
    SETTINGS[f"{name}_labels_alone_longer"] = replace(row, overrides={**row.overrides, **alone})
# what more of the student could give, so what a crew could teach at most: length, side, and a crew's member as student
MORE: dict[str, dict[str, Any]] = {
    "kvasir_all_1000": {"max_epochs": 80, "image_size": 256},
    "covid_1000": {"max_epochs": 80, "image_size": 256},
    "busi_1000": {"max_epochs": 80, "image_size": 256},
    "heart": {"max_epochs": 24},
    "aptos2019_quarter": {"max_epochs": 60, "image_size": 448},
    "isic2017_120": {"max_epochs": 16, "image_size": 256},  # of most files
}
LITE1 = {"encoder": "tf_efficientnet_lite1"}
for name, more in MORE.items():
    last = SETTINGS[f"{name}_last"]
    variants = {"twice_length": {"max_epochs": more["max_epochs"]}, "member": LITE1}
    if side := more.get("image_size"):
        finer = {"image_size": last.overrides["image_size"] * 3 // 2}
        variants |= {"twice_side": {"image_size": side}, "finer_member": {**LITE1, **finer}}
    for variant, overrides in variants.items():
        overrides = {**last.overrides, **overrides}
        SETTINGS[f"{name}_{variant}"] = replace(last, overrides=overrides, reference=f"{name}_last")
# crews at the student's side and at 1.5 times that, to ask what they know (`crew_scores.py`)
for name in MORE:
    row = replace(SETTINGS[f"{name}_last"], reference=f"{name}_last")
    row = replace(row, overrides={**row.overrides, **ADMITTED})
    for what, side in {"side": 1.0, "finer": 1.5}.items():
        crew = [{**SMALL_CREW["teachers"][0], "image_size": side}]
        SETTINGS[f"{name}_{what}_crew"] = replace(row, teachers=crew)
SETTINGS["heart_side_compared"] = replace(SETTINGS["heart_side_crew"], overrides=SETTINGS["heart_last"].overrides)
# crews of one member and of two, for runs of the default length, whether they are admitted or not
MEMBERS = {"one": [LITE1], "two": [LITE1, {"encoder": "tf_efficientnet_lite2"}]}
SIDES = {"isic2017_120_last": 1.0, "aptos2019_quarter_twice_length": 1.0, "covid_12_pool_longer": 1.5}
for name, side in SIDES.items():
    row = SETTINGS[name]
    row = replace(row, overrides={**row.overrides, **ADMITTED}, reference=row.reference if row.pool else name)
    for count, members in MEMBERS.items():
        crew = [{**SMALL_CREW["teachers"][0], "members": members, "image_size": side}]
        SETTINGS[f"{row.bundle}_{count}_admitted"] = replace(row, teachers=crew)
finest = [{**SMALL_CREW["teachers"][0], "image_size": 384, "images": 2048}]
SETTINGS["aptos2019_quarter_finest_crew"] = replace(SETTINGS["aptos2019_quarter_finer_crew"], teachers=finest)
# as users have it by default, 256 pixels and 1000 steps; and nearly all images of the set, 80 % to train
for labels in (12, "all"):
    row = SETTINGS[f"kvasir_{labels}_last"]
    own = {key: value for key, value in row.overrides.items() if key not in ("image_size", "max_epochs", *SHORT)}
    last = SETTINGS[f"kvasir_{labels}_256_last"] = replace(row, overrides=own, reference=f"kvasir_{labels}_last")
    SETTINGS[f"kvasir_{labels}_256_small_crew"] = replace(last, reference=f"kvasir_{labels}_256_last", **SMALL_CREW)
# few labels and the pool, 1000 steps; members see as many images as the student, in place of a third
last = replace(SETTINGS["busi_all_last"], overrides={**SETTINGS["busi_all_last"].overrides, "labelled": 12})
SETTINGS["busi_12_1000_last"] = last
longer = {"teachers": [{**SMALL_CREW["teachers"][0], "images": 8192}]}
SETTINGS["busi_12_1000_pool"] = replace(last, reference="busi_12_1000_last", pool=FURTHER["busi"][0], **longer)
for name in ("busi_12_1000_pool", "busi_all_pool"):
    row = SETTINGS[name]
    SETTINGS[f"{name}_admitted"] = replace(row, overrides={**row.overrides, **ADMITTED})
LARGE_KVASIR = {"image_size": 192, "split_fractions": [0.8, 0.1, 0.1], "val_interval": 4}
last = replace(SETTINGS["kvasir_all_last"], overrides=LARGE_KVASIR, reference=None, joined="kvasir")
SETTINGS["kvasir_large_last"] = last
SETTINGS["kvasir_large_default"] = replace(
    last, overrides={**LARGE_KVASIR, **FEATURES_ONLY}, reference="kvasir_large_last", teachers=None
)
SETTINGS |= {
    # all labels and 786 images without, as many steps as `kvasir_all_last_longer`
    "kvasir_all_pool": replace(
        SETTINGS["kvasir_all_small_crew"],
        overrides={**SETTINGS["kvasir_all_small_crew"].overrides, "max_epochs": 15, "val_interval": 1},
        reference="kvasir_all_last_longer",
        pool="kvasir/images/*",
    ),
    "kvasir_12_pool_admitted": replace(crew_of_12, overrides=WITH_POOL, pool="kvasir/images/*"),
    "kvasir_12_uncalibrated": replace(
        SETTINGS["kvasir_12_last"], overrides={**SETTINGS["kvasir_12_last"].overrides, "calibrate_masks": False}
    ),
    "kvasir_12_output_alone": replace(crew_of_12, overrides={**crew_of_12.overrides, **OUTPUT_ALONE}),
    "kvasir_12_admitted": few,
    "kvasir_12_admitted_at_once": replace(few, overrides={**few.overrides, **AT_ONCE}),
    "covid_admitted": slices,
    "covid_pool_admitted": pool,
    "covid_pool_admitted_at_once": replace(pool, overrides={**pool.overrides, **AT_ONCE}),
    "covid_pool_long_crew_admitted": replace(pool, **LONG_CREW),
}
# what training varies by alone: features at 1/170 of the weight they have by default
SETTINGS["isic2017_control"] = replace(
    SETTINGS["isic2017_default"],
    overrides={**SMALL["isic2017"][1], **FEATURES_ONLY, "losses": {"output": 1.0, "feature": 0.001}},
)

if __name__ == "__main__":
    main(SETTINGS, options(str(__doc__), "runs/results").parse_args())
