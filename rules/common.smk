# The competition as the rules see it. Everything that needs thought is in src/palio/workflow.py.
#
#   resources/base_models/<base_model>/     fetched once for all entries
#   resources/stages/<stage>/stage.json     the stage's instances, made once by HELM
#   results/<track>/<entry>/                one entry; logs/ and work/ inside it
#   results/{leaderboard,standings,report}/
#
# A step of an entry is `palio step <name> results/<track>/<entry>`. Its only parameter is its settings, the slice of
# the competition and the entry that decides its result; --options is how it runs here, a resource, and re-runs nothing.
#
# Every command is `exec palio`: a signal reaches all processes of a job. A shell in between would die of it at once,
# and the job with it, while Palio still saves.
#
# No edge between two rules is only ancient(): where an upstream job is due, Snakemake leaves its downstream jobs
# to the edges and asks them nothing itself, so behind an ancient() edge a changed recipe or a missing output would
# wait for the next start. A step that starts again finds what it had finished instead.
from palio.demo.data import FAMILIES as DEMO_FAMILIES
from palio.errors import BadInput, PalioError
from palio.operating import controller
from palio.workflow import Workflow

try:
    W = Workflow(config)
except BadInput as fault:
    raise WorkflowError(str(fault)) from None
if workflow.is_main_process:  # a job of one entry reads no other's file
    for fault in W.faults:
        logger.warning(f"This entry will not run: {fault}")


wildcard_constraints:
    track="|".join(W.tracks),
    entry="[A-Za-z0-9][A-Za-z0-9_-]*",
    stage="open|closed",
    phase=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


# Of a run, never of its jobs. Standings run beside another run, so they take nothing over.
onstart:
    if any(job.rule.name != "standings" for job in workflow.dag.needrun_jobs()):
        try:
            controller.take_over(on_slurm=not workflow.local_exec)
        except PalioError as fault:
            raise WorkflowError(str(fault)) from None
        controller.watch(W.competition)


onsuccess:
    controller.notify(W.competition, "finish", "every step is done")


onerror:
    controller.notify(
        W.competition,
        "failure",
        "the run ended with failed steps; palio status names them",
    )
