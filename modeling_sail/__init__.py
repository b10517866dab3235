"""SAIL-Embedding: omni-modal item embeddings, Hugging Face-native.

Importing the package registers the model, so that a saved folder loads with AutoConfig, AutoModel and AutoProcessor
without ``trust_remote_code``.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_sail import SailEmbeddingConfig
from .modeling_sail import SailEmbeddingModel, SailOutput
from .processing_sail import SailEmbeddingProcessor

__version__ = "0.1.0"
__all__ = ["SailEmbeddingConfig", "SailEmbeddingModel", "SailEmbeddingProcessor", "SailOutput"]

AutoConfig.register(SailEmbeddingConfig.model_type, SailEmbeddingConfig, exist_ok=True)
AutoModel.register(SailEmbeddingConfig, SailEmbeddingModel, exist_ok=True)
AutoProcessor.register(SailEmbeddingConfig, SailEmbeddingProcessor, exist_ok=True)
