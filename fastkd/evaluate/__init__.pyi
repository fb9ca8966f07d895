from .api import Evaluation as Evaluation
from .api import compare as compare
from .api import evaluate as evaluate
from .measures import MEASURES as MEASURES
