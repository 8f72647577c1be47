"""Run benchmarks with lmms-eval, in the environment that ``make .venv-eval/installed`` sets up.

plugin.py   the lmms-eval model "llavolta": any checkpoint under any plan
run.py      runs lmms-eval, raises when it fails, and reads its result files
table.py    makes the papers' tables from result files
local.py    writes benchmarks as local files: the digits questions as GQA, VQAv2 and POPE
video.py    writes MSVD-QA and MSRVTT-QA as tasks

Only plugin.py imports lmms-eval when it is imported.
"""

# lmms-eval's names of the papers' benchmarks. The last four have hidden answers: lmms-eval writes a
# submission file for the benchmark's server.
TASKS = (
    *(
        "gqa",
        "vqav2_val",
        "vizwiz_vqa_val",
        "scienceqa_img",
        "textvqa_val",
        "pope",
        "mme",
        "mmbench_en_dev_static",
    ),
    *("mmbench_cn_dev", "seedbench", "llava_in_the_wild", "mmvet", "activitynetqa"),
    *("vqav2_test", "vizwiz_vqa_test", "mmbench_en_test", "mmbench_cn_test"),
)
# A language model scores these, through an endpoint with OpenAI's interface.
JUDGED_TASKS = (
    "llava_in_the_wild",
    "mmvet",
    "mmbench_en_dev",
    "mmbench_cn_dev",
    "activitynetqa",
    "msvd_qa_judged",
    "msrvtt_qa_judged",
)


def manifest():
    """Tell lmms-eval where the model "llavolta" is. This is an entry point of the package."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llavolta", simple_class_path="llavolta.harness.plugin.Llavolta")
