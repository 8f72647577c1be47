"""Benchmarks through lmms-eval, in the extra environment that ``make .venv-eval/installed`` sets up.

plugin.py   the model of lmms-eval: any checkpoint under any plan
run.py      runs the harness, fails when it fails, reads what it wrote
local.py    benchmarks as local files; the embedded digits as GQA, VQAv2 and POPE
video.py    MSVD-QA and MSRVTT-QA

Only plugin.py imports lmms-eval.
"""

# lmms-eval's names of the papers' benchmarks; those for a server write the files that it takes.
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
# A judge, a language model behind an endpoint of OpenAI's make, scores these.
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
    """Where lmms-eval finds the model "llavolta"; the entry point of the package."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llavolta", simple_class_path="llavolta.harness.plugin.Llavolta")
