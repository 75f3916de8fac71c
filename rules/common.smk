# The competition as the rules see it. Everything that needs thought is in src/palio/workflow.py.
#
#   resources/base_models/<base_model>/     fetched once for all entries
#   resources/stages/<stage>/stage.json     the stage's instances, made once by HELM
#   results/<track>/<entry>/                one entry; logs/ and work/ inside it
#   results/{leaderboard,standings,report}/
from palio.demo.data import FAMILIES as DEMO_FAMILIES
from palio.errors import BadInput
from palio.workflow import Workflow

try:
    W = Workflow(config)
except BadInput as fault:
    raise WorkflowError(str(fault)) from None
for fault in W.faults.values():
    logger.warning(f"This entry will not run: {fault}")


wildcard_constraints:
    track="|".join(W.tracks),
    entry="[A-Za-z0-9][A-Za-z0-9_-]*",
    stage="open|closed",
