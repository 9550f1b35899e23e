"""Methods that other tools and papers know and that are not here, with the nearest that is."""

from __future__ import annotations

from collections.abc import Collection

# By tool, the method that comes nearest and the names that it is nearest to. A name counts only
# while the table has no method of that name, so that this list may name methods that were added.
_KNOWN = {
    "mergekit's": {
        "ties": "dare_ties breadcrumbs_ties della sce arcee_fusion",
        "task_arithmetic": "dare_linear breadcrumbs della_linear ram ramplus_tl",
        "linear": "slerp nuslerp multislerp karcher nearswap model_stock",
    },
    "sd-mecha's": {
        "linear": "weighted_sum n_average geometric_sum tensor_sum crossover rotate copy_region "
        "exchange_ema fallback",
        "karcher": "geometric_median",
        "slerp": "add_cosine_a add_cosine_b cosine_add_a cosine_add_b cosine_add",
        "task_arithmetic": "add_difference train_difference train_difference_mask subtract clamp "
        "add_perpendicular perpendicular_component add_opposite_mask add_strict_opposite_mask",
        "ties": "ties_sum ties_sum_extended add_difference_ties add_difference_ties_extended",
        "dare_ties": "ties_with_dare ties_sum_with_dropout",
        "dare_linear": "dropout",
        "model_stock": "n_model_stock",
    },
    "FusionBench's": {
        "linear": "simple_average weighted_average linear_interpolation regmean fisher "
        "simple_ensemble weighted_ensemble gossip opcm model_recombination ada_svd dawe",
        "fisher": "fisher_merging",
        "regmean": "regmean_plusplus regmean_plus_plus regmean++ regmean_pp",
        "dare_linear": "dare dare_simple_average dare_task_arithmetic",
        "dare_ties": "dare_ties_merging",
        "ties": "ties_merging emr emr_merging magmax tall_mask randes magnitude_diff_pruning "
        "concrete concrete_subspace concrete_task_arithmetic",
        "task_arithmetic": "adamerging task_wise_adamerging layer_wise_adamerging iso_c iso_cts "
        "tsv_m wudi doge_ta dop expo fw fw_merging surgery trust_region bitdelta knots",
        "iso_c": "isotropic isotropic_merging",
        "tsv_m": "tsv tsvm task_singular_vector",
        "wudi": "wudi_merging",
        "passthrough": "depth_upscaling mixtral_upscaling smile_upscaling we_moe wemoe "
        "rankone_moe sparse_we_moe pwe_moe",
    },
    "": {
        "linear": "model_soup model_soups greedy_soup uniform_soup average mean swa ema rebasin "
        "git_rebasin zipit",
        "ties": "pcb twin twin_merging twinmerging consensus_ta "
        "consensus_ties localize_and_stitch widen cat cat_merging star",
        "task_arithmetic": "swudi aswudi resmerge task_vector task_vectors ta cart cabs metagpt",
        "pcb": "pcb_merging",
        "consensus_ta": "consensus",
        "passthrough": "frankenmerge franken moe",
    },
}
# What does the same as a method of ours.
_SAME = {
    "weighted_sum": "linear", "n_average": "linear", "simple_average": "linear",
    "weighted_average": "linear", "linear_interpolation": "linear", "average": "linear",
    "mean": "linear", "model_soup": "linear", "model_soups": "linear", "uniform_soup": "linear",
    "add_difference": "task_arithmetic", "task_vector": "task_arithmetic",
    "task_vectors": "task_arithmetic", "ta": "task_arithmetic", "ties_merging": "ties",
    "isotropic": "iso_c", "isotropic_merging": "iso_c", "tsv": "tsv_m", "tsvm": "tsv_m",
    "task_singular_vector": "tsv_m", "pcb_merging": "pcb", "fisher_merging": "fisher",
    "consensus": "consensus_ta", "wudi_merging": "wudi", "adamerging": "task_arithmetic",
    "task_wise_adamerging": "task_arithmetic", "layer_wise_adamerging": "task_arithmetic",
    "regmean_plusplus": "regmean", "regmean_plus_plus": "regmean", "regmean++": "regmean",
    "regmean_pp": "regmean",
}  # fmt: skip
# What a command makes of it.
_HOW = {
    **dict.fromkeys(
        ("adamerging", "task_wise_adamerging", "layer_wise_adamerging"),
        ", whose weights `outliermerge fit` finds",
    ),
    **dict.fromkeys(
        _KNOWN["FusionBench's"]["regmean"].split(),
        ", with the statistics that `outliermerge measure` makes of a spec",
    ),
}
_PLACES = {
    name: (tool, nearest)
    for tool, groups in _KNOWN.items()
    for nearest, names in groups.items()
    for name in names.split()
}


def known_elsewhere(name: str, here: Collection[str]) -> str | None:
    """Return what to say of a method that other tools know; None if none is known to.

    Args:
        here: the names of the methods that there are.

    >>> known_elsewhere("simple-average", ["linear"])
    "FusionBench's simple-average is here as 'linear'."
    >>> known_elsewhere("ties_with_dare", ["linear", "ties"])
    "sd-mecha's ties_with_dare is not here; the nearest is 'ties'."
    >>> known_elsewhere("AdaMerging", ["task_arithmetic"])
    "FusionBench's AdaMerging is here as 'task_arithmetic', whose weights `outliermerge fit` finds."
    """
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    if plain not in _PLACES:
        return None
    tool, nearest = _PLACES[plain]
    while nearest not in here and nearest in _PLACES:
        nearest = _PLACES[nearest][1]
    what = f"{tool} {name}" if tool else f"{name}, known from papers,"
    if _SAME.get(plain) in here:
        return f"{what} is here as {nearest!r}{_HOW.get(plain, '')}."
    return f"{what} is not here; the nearest is {nearest!r}."
