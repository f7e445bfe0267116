"""Activity: equal to copairs and a published table; right p-values on treatments that do nothing; distances, doses, counts, neighbours."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cellfast.cli.activity import activity as activity_command
from cellfast.errors import CellfastError
from cellfast.profiles.activity import ActivityOptions, precision_against, score_activity
from cellfast.profiles.evaluate import EvaluationOptions, evaluate_profiles
from cellfast.profiles.exchange import exchange
from cellfast.profiles.hits import activity_lines
from cellfast.profiles.precision_null import false_discovery_rates, null_precisions, precision_p_values
from cellfast.profiles.ranking_kernels import draw_precisions
from cellfast.profiles.results import read_annotated
from cellfast.profiles.table import ProfileTable, write_profiles

QUICK = {"num_permutations": 499, "null_size": 500}


def plates(rng, treatments=10, num_plates=3, controls=12, dims=8, plate_effect=2.0, effects=(), doses=(1.0,), wells=1):
    """Each plate: its shift, controls, and every treatment ``wells`` times; treatment i adds effects[i] · its direction · dose."""
    rows, features = [], []
    directions = rng.normal(size=(treatments, dims))
    for p in range(num_plates):
        shift = plate_effect * rng.normal(size=dims)
        for c in range(controls):
            rows.append(("DMSO", 0.0, "", f"p{p}", f"b{p // 2}", 100 + c))
            features.append(shift + rng.normal(size=dims))
        for t in range(treatments):
            for dose in doses:
                for _ in range(wells):
                    size = (effects[t] if t < len(effects) else 0.0) * dose
                    rows.append((f"c{t}", dose, f"m{t % 4}", f"p{p}", f"b{p // 2}", int(100 - 20 * min(size, 4))))
                    features.append(shift + size * directions[t] + rng.normal(size=dims))
    columns = [
        "Metadata_Compound",
        "Metadata_Concentration",
        "Metadata_MoA",
        "Metadata_Plate",
        "Metadata_Batch",
        "Metadata_Cell_Count",
    ]
    metadata = pd.DataFrame(rows, columns=columns)
    metadata["Metadata_Well"] = [f"{chr(65 + i % 400 // 24)}{i % 24 + 1:02d}" for i in range(len(rows))]
    return ProfileTable(metadata, np.array(features), [f"h{i:03d}" for i in range(dims)])


def copairs_table(metadata, features, pos, neg, by, pos_diff=(), size=500):
    from copairs.map import average_precision, mean_average_precision

    ap = average_precision(metadata, features, list(pos), list(pos_diff), [], list(neg), progress_bar=False)
    ap = ap[ap["treated"]].reset_index(drop=True)
    return mean_average_precision(ap, by, size, 0.05, 0, progress_bar=False).sort_values(by).reset_index(drop=True)


@pytest.mark.parametrize("across", ["none", "plate"])
def test_precision_p_values_and_rates_are_those_of_copairs(across):
    pytest.importorskip("copairs")
    wells = plates(np.random.default_rng(0), effects=(2.0, 0.5, 0.2))
    found = score_activity(wells, ActivityOptions(across=across, **QUICK)).treatments
    frame = wells.metadata.assign(treated=wells.metadata["Metadata_Compound"] != "DMSO")
    # Controls are no one's replicates; a pair of two treatments is neither positive nor negative.
    frame["group"] = [c if t else f"control{i}" for i, (c, t) in enumerate(zip(frame["Metadata_Compound"], frame["treated"]))]
    more = ["Metadata_Plate"] if across == "plate" else []
    theirs = copairs_table(frame, wells.features, ["group"], ["treated", *more], ["group"], more)
    everyone = copairs_table(frame, wells.features, ["group"], ["group", *more], ["group"], more)
    for name, table in (("map_control", theirs), ("map_all", everyone)):
        assert np.allclose(found[name], table["mean_average_precision"], atol=1e-12)
        assert np.allclose(found[f"{name}_normalized"], table["mean_normalized_average_precision"], atol=1e-12)
        assert np.allclose(found[f"{name}_p"], table["p_value"], atol=1e-12)
        assert np.allclose(found[f"{name}_q"], table["corrected_p_value"], atol=1e-12)


def test_drawn_precisions_have_the_distribution_of_permuted_ones():
    slow = null_precisions(np.array([[3, 40]]), 20_000, 1)[0]
    fast = np.empty(20_000, np.float32)
    draw_precisions(3, 40, np.array([7], np.uint64), fast)
    for share in (10, 50, 90, 99):
        assert np.percentile(fast, share) == pytest.approx(np.percentile(slow, share), abs=0.02)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.003)
    assert np.isnan(false_discovery_rates(np.array([0.01, np.nan, 0.5]))[1])
    assert list(false_discovery_rates(np.array([0.04, 0.01, 0.03]))) == pytest.approx([0.04, 0.03, 0.04])
    values = np.array([1.0, 0.2])
    assert len(precision_p_values(values, np.array([1, 1]), np.array([9, 9]), np.array([0, 3]), 100, 0)) == 4


@pytest.mark.data
def test_the_published_table_of_a_jump_moa_plate_is_reproduced(real_data, tmp_path):
    folder = real_data / "jump_moa"
    result = CliRunner().invoke(
        activity_command,
        [str(folder / "BR00122246_wells.csv.gz"), "-o", str(tmp_path / "hits.csv"), "--features", "^(Image|Cells|Cytoplasm|Nuclei)_",
         "--permutations", "199", "--column", "compound=Metadata_broad_sample"],
    )  # fmt: skip
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "left out  1 of 676 features" in result.output
    found = pd.read_csv(tmp_path / "hits_compounds.csv").set_index("Metadata_Compound")
    published = pd.read_csv(folder / "BR00122246_published_map_treatment.csv").set_index("Metadata_broad_sample").drop("control")
    assert len(found) == 90
    found = found.loc[published.index]
    assert (np.abs(found["map_all"] - published["mean_average_precision"]) < 1e-6).sum() == 88
    # Drawn anew: two draws of 10,000.
    assert np.abs(found["map_all_p"] - published["p_value"]).max() < 0.03
    assert np.corrcoef(found["map_all_q"], published["corrected_p_value"])[0, 1] > 0.99
    summary = json.loads((tmp_path / "hits.json").read_text())
    assert abs(summary["calibration"]["map"]["share_below_0.05"] - 0.05) < 0.05


def test_treatments_that_do_nothing_are_active_in_5_percent_whatever_the_plates_do():
    """120 inert treatments on plates that differ; at the same time a treatment that does something is found."""
    rng = np.random.default_rng(1)
    found = [score_activity(plates(rng, treatments=40, effects=(3.0,)), ActivityOptions(**QUICK)) for _ in range(3)]
    inert = pd.concat([f.treatments.iloc[1:] for f in found])
    for name in ("map_p", "mahalanobis_p", "e_distance_p"):
        assert 0.005 <= (inert[name] <= 0.05).mean() <= 0.11, name
        assert (inert[name] <= 0.5).mean() == pytest.approx(0.5, abs=0.12), name
        assert all(f.treatments[name].iloc[0] == 1 / 500 for f in found)
    for f in found:
        calibration = f.result["calibration"]
        assert calibration["num_sets"] == 200
        assert calibration["mahalanobis"]["share_below_0.05"] == pytest.approx(0.05, abs=0.045)
    assert "sets of controls taken for treatments" in "\n".join(activity_lines(found[0]))


def test_statistics_of_exchanged_labels_are_what_they_are_called():
    """One plate: the precision is that of all controls, the energy distance as written out, its p-value that of plain permutation."""
    rng = np.random.default_rng(2)
    wells = plates(rng, treatments=4, num_plates=1, effects=(0.8,), wells=4)
    codes = pd.factorize(wells.metadata["Metadata_Compound"])[0] - 1
    controls, members = np.flatnonzero(codes < 0), [np.flatnonzero(codes == t) for t in range(4)]
    counts = wells.metadata["Metadata_Cell_Count"].to_numpy(float)
    found = exchange(wells.features, counts, members, controls, np.zeros(len(codes), int), num_permutations=4999)
    ap = precision_against(wells.features, codes, controls, False, "cosine", None)
    assert np.allclose(found.precision, [ap.values[rows].mean() for rows in members])
    x = wells.features
    logs = np.log1p(counts)

    def energy(a, b):
        def mean(one, other):
            return np.linalg.norm(x[one][:, None] - x[other][None], axis=2).mean()

        return 2 * mean(a, b) - mean(a, a) - mean(b, b)

    def count(a, b):
        return (logs[a].mean() - logs[b].mean()) ** 2

    for t in range(4):
        assert found.e_distance[t] == pytest.approx(energy(members[t], controls))
        pool = np.concatenate([members[t], controls])
        drawn = [rng.permutation(pool) for _ in range(1500)]
        for column, statistic in ((2, energy), (3, count)):
            as_good = sum(statistic(d[:4], d[4:]) >= statistic(members[t], controls) - 1e-12 for d in drawn)
            assert found.p_values[t, column] == pytest.approx((1 + as_good) / 1501, abs=0.04)


def test_distance_induction_and_count_ratio_are_written_out():
    from sklearn.covariance import LedoitWolf

    wells = plates(np.random.default_rng(3), treatments=3, num_plates=2, controls=10, effects=(2.0,))
    metadata, x = wells.metadata, wells.features
    found = score_activity(wells, ActivityOptions(**QUICK)).treatments
    control = (metadata["Metadata_Compound"] == "DMSO").to_numpy()
    centred = x.copy()
    for plate in ("p0", "p1"):
        on = (metadata["Metadata_Plate"] == plate).to_numpy()
        centred[on] -= x[on & control].mean(axis=0)
    precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centred[control]).covariance_)
    bound = np.percentile(np.abs(centred[control]), 99, axis=0)
    for t in range(3):
        rows = (metadata["Metadata_Compound"] == f"c{t}").to_numpy()
        mean = centred[rows].mean(axis=0)
        assert found["mahalanobis"][t] == pytest.approx(np.sqrt(mean @ precision @ mean))
        assert found["induction"][t] == pytest.approx((np.abs(np.median(centred[rows], axis=0)) > bound).mean())
        counts = metadata["Metadata_Cell_Count"].to_numpy(float)
        assert found["count_ratio"][t] == pytest.approx(counts[rows].mean() / counts[control][:10].mean())


def test_equal_wells_are_not_active():
    """Ties are nobody's: every treated well equals a control."""
    wells = plates(np.random.default_rng(4), treatments=5, num_plates=1, controls=12, wells=3)
    wells.features[:] = np.tile(np.random.default_rng(5).normal(size=(3, 8)), (9, 1))
    found = score_activity(wells, ActivityOptions(**QUICK))
    assert not found.treatments["active"].any()
    assert (found.treatments[["map_p", "e_distance_p"]] > 0.05).all(axis=None)
    assert found.result["counts"]["identical_wells"] == 27


def test_effects_that_grow_with_the_dose_and_the_lowest_active_one():
    rng = np.random.default_rng(6)
    wells = plates(rng, treatments=6, num_plates=4, controls=16, effects=(1.0, 1.0), doses=(0.1, 0.3, 1.0, 3.0, 10.0))
    found = score_activity(wells, ActivityOptions(num_permutations=1999, null_size=500))
    doses = found.doses.set_index("Metadata_Compound")
    assert list(doses["num_doses"]) == [5] * 6
    assert (doses.loc[["c0", "c1"], "trend_q"] < 0.01).all()
    assert (doses.loc[["c2", "c3", "c4", "c5"], "trend_q"] > 0.05).all()
    assert doses.loc["c0", "lowest_active_dose"] in (1.0, 3.0)
    assert doses.loc["c0", "active_above"]
    assert np.isnan(doses.loc["c5", "lowest_active_dose"])
    # The count follows the effect here, so count alone finds these too, and the table says so.
    assert found.treatments.set_index(["Metadata_Compound", "Metadata_Concentration"]).loc[("c0", 10.0), "count_q"] < 0.05
    assert len(found.compounds) == 6


def test_nearest_treatments_and_the_margin_of_the_nearest_moa():
    angles = {"a": 0.0, "b": 0.1, "c": 0.3, "d": 1.0}
    rows, features = [], []
    for name, moa in zip("abcd", ("X", "X|Y", "Z", "Z")):
        for i in range(2):
            rows.append((name, 1.0, moa, "p", f"{name}{i}"))
            features.append([np.cos(angles[name]), np.sin(angles[name])])
    for i in range(6):
        rows.append(("DMSO", 0.0, "", "p", f"k{i}"))
        features.append([np.cos(3 + 0.2 * i), np.sin(3 + 0.2 * i)])
    metadata = pd.DataFrame(rows, columns=[f"Metadata_{c}" for c in ("Compound", "Concentration", "MoA", "Plate", "Well")])
    found = score_activity(ProfileTable(metadata, np.array(features), ["f1", "f2"]), ActivityOptions(**QUICK)).treatments
    assert list(found["nearest_1"]) == ["b 1", "a 1", "b 1", "c 1"]
    assert list(found["nearest_2"]) == ["c 1", "c 1", "a 1", "b 1"]
    assert list(found["nearest_moa"]) == ["X|Y", "X", "X|Y", "Z"]
    # b is nearest a by 0.1; the nearest without X or Y is c by 0.3.
    assert found["moa_margin"][0] == pytest.approx(np.cos(0.1) - np.cos(0.3), abs=1e-6)
    assert found["nearest_1_similarity"][3] == pytest.approx(np.cos(0.7), abs=1e-6)
    assert "count_ratio" not in found


def test_command_writes_tables_and_says_what_is_wrong(tmp_path):
    wells = plates(np.random.default_rng(7), treatments=4, effects=(4.0,), doses=(1.0, 2.0, 3.0))
    wells.provenance = {"steps": [{"step": "sphering"}]}
    write_profiles(wells, tmp_path / "wells.parquet")

    def run(*arguments):
        return CliRunner().invoke(activity_command, [str(a) for a in arguments])

    done = run(tmp_path / "wells.parquet", "-o", tmp_path / "hits.parquet", "--permutations", 199, "--hit-by", "mahalanobis")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert "hit       c0" in done.output
    assert "sphered on controls" in done.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "wells.parquet", "hits.parquet", "hits_compounds.parquet", "hits_doses.parquet", "hits.json",
    }  # fmt: skip
    assert len(pd.read_parquet(tmp_path / "hits.parquet")) == 12
    assert json.loads((tmp_path / "hits.json").read_text())["options"]["hit_by"] == "mahalanobis"
    again = run(tmp_path / "wells.parquet", "-o", tmp_path / "again.parquet", "--permutations", 199, "--hit-by", "mahalanobis")
    assert again.exit_code == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "hits.parquet"), pd.read_parquet(tmp_path / "again.parquet"))
    single = wells.rows(np.flatnonzero((wells.metadata["Metadata_Plate"] == "p0").to_numpy()))
    with pytest.raises(CellfastError, match=r"has one well.*--level well"):
        score_activity(single)
    with pytest.raises(CellfastError, match="No control wells found"):
        score_activity(wells.rows(np.flatnonzero((wells.metadata["Metadata_Compound"] != "DMSO").to_numpy())))
    with pytest.raises(CellfastError, match="across plate needs wells of several"):
        score_activity(single.rows(np.r_[0 : len(single), 12 : len(single)]), ActivityOptions(across="plate"))
    assert isinstance(run(tmp_path / "wells.parquet", "-o", tmp_path / "hits.txt").exception, CellfastError)


def test_marks_of_controls_in_a_csv_are_read_as_what_they_say(tmp_path):
    """As text both True and False are true, and every row would be a control."""
    wells = plates(np.random.default_rng(8), treatments=3)
    wells.metadata["Metadata_Control"] = (wells.metadata["Metadata_Compound"] == "DMSO").to_numpy()
    write_profiles(wells, tmp_path / "wells.csv")
    table = read_annotated(tmp_path / "wells.csv")
    assert table.metadata["Metadata_Control"].sum() == 36
    assert evaluate_profiles(table, EvaluationOptions(num_permutations=9)).result["counts"]["controls"] == 36
    assert score_activity(table, ActivityOptions(**QUICK)).result["counts"]["controls"] == 36
    wells.metadata["Metadata_Control"] = "perhaps"
    write_profiles(wells, tmp_path / "wells.csv")
    with pytest.raises(CellfastError, match="must be True or False in every row; found 'perhaps'"):
        read_annotated(tmp_path / "wells.csv")
