# The competition as the rules see it. Everything that needs thought is in src/palio/workflow.py.
#
#   resources/base_models/<base_model>/     fetched once for all entries
#   resources/stages/<stage>/stage.json     the stage's instances, made once by HELM
#   resources/windows/                      tokenizers that count tokens of prompts, each made once
#   results/<track>/<entry>/                one entry; logs/ and work/ inside it
#   results/<track>/<entry>/replicates/2/   the entry trained again with another seed, by the same rules: the wildcard
#                                           `entry` is then <entry>/replicates/2, and `entry_id` the entry itself
#   results/{leaderboard,standings,report,site}/
#
# A step of an entry is `palio step <name> results/<track>/<entry> --settings …`: the slice of the competition and the
# entry that decides its result, which its record then names. --options is how it runs here, and changes no result.
#
# Every command is `exec palio`: a signal reaches all processes of a job. A shell in between would die of it at once,
# and the job with it, while Palio still saves.
#
# Which steps run is in the records, not in Snakemake's metadata (src/palio/planning.py): a step reads its inputs
# if it is due, and `again`, newer than its record, if it has one; else it reads nothing.
import atexit
import os

from snakemake.settings.types import RerunTrigger

from palio.demo.data import FAMILIES as DEMO_FAMILIES
from palio.errors import BadInput, PalioError
from palio.layout import CONFIG
from palio.operating import controller
from palio.operating.attempt import RUN_VARIABLE
from palio.workflow import Workflow

try:
    # a job does what its run planned, whatever has been edited since
    W = (
        None
        if workflow.is_main_process
        else Workflow.planned_by(os.environ.get(RUN_VARIABLE))
    )
    W = W or Workflow(config or CONFIG)
except BadInput as fault:
    raise WorkflowError(str(fault)) from None
if workflow.is_main_process:
    W.forced = lambda: workflow.dag_settings.forceall or workflow.dag_settings.forcerun
    if controller.running() is None:
        controller.put_back_all(W)
    for fault in W.faults:
        logger.warning(f"This entry will not run: {fault}")
else:
    atexit.register(controller.mark_end)


wildcard_constraints:
    track="|".join(W.tracks),
    entry="[A-Za-z0-9][A-Za-z0-9_-]*(/replicates/[0-9]+)?",
    stage="open|closed",
    phase=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


# Of a run, never of its jobs. Standings run beside another run, so they take nothing over.
onstart:
    controller.lift_default_limit(workflow)
    if workflow.rerun_triggers != {RerunTrigger.MTIME}:
        raise WorkflowError(
            "Start with a profile of profiles/, or with --rerun-triggers mtime."
        )
    if any(job.rule.name != "standings" for job in workflow.dag.needrun_jobs()):
        try:
            controller.begin(W, on_slurm=not workflow.local_exec)
        except PalioError as fault:
            raise WorkflowError(str(fault)) from None


onsuccess:
    controller.end(W, "finish", "every step is done")


onerror:
    controller.end(W, "failure", "some steps have failed; palio status names them")
