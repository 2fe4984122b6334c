"""vLLM's EngineCore on a thread of this process, behind the client that AsyncLLM expects.

AsyncLLM as shipped needs a spawned EngineCore, and on CPU a spawned worker below it: three imports of torch and vLLM
(58 s to the first token of a micro model on two cores) and shared memory between them. One process needs a third of
that and leaves nothing behind. Used where one device serves one engine; tensor parallel engines take vLLM's own way.
"""

import asyncio
import logging
import queue
import threading
from concurrent.futures import Future
from typing import Any

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources, EngineCoreClient, _process_utility_output
from vllm.v1.engine.exceptions import EngineDeadError

logger = logging.getLogger(__name__)


class Outputs:
    """The queue that the core puts its outputs into: hands them to the event loop of the client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Any) -> None:
        self.loop, self.receive = loop, receive

    def put_nowait(self, item: tuple[int, EngineCoreOutputs]) -> None:
        self.loop.call_soon_threadsafe(self.receive, item[1])


class ThreadCore(EngineCoreProc):
    """EngineCoreProc with its queues and busy loop, without sockets and handshakes."""

    reject_new_requests = False  # read by vLLM 0.33

    def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool, outputs: Outputs) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue = outputs  # type: ignore[assignment]
        self.engine_index = 0
        self.engines_running = False
        self.shutdown_state = EngineShutdownState.RUNNING
        self.tensor_ipc_receiver = None
        self.has_coordinator = self.publish_dp_lb_stats = self.enable_fault_tolerance = False
        self.frontend_stats_publish_address = None
        self.last_counts = (0, 0)
        self.process_input_queue_block = True
        EngineCore.__init__(self, vllm_config, executor_class, log_stats)


class ThreadClient(AsyncMPClient):
    """AsyncMPClient over the queues of a ThreadCore. Everything runs in torch's OpenMP pool of the core's thread."""

    def __init__(self, vllm_config: Any, executor_class: Any, log_stats: bool) -> None:
        self.vllm_config = vllm_config
        self.client_index = 0
        self.core_engine = b""
        self.core_engines = [b""]
        self.engine_ranks_managed = [0]
        self.engines_running = False
        self.utility_results: dict[int, Any] = {}
        self.resources = BackgroundResources(ctx=None)  # type: ignore[arg-type]
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()
        self._calls = 0
        started: Future[ThreadCore] = Future()
        outputs = Outputs(asyncio.get_running_loop(), self._receive)
        arguments = (vllm_config, executor_class, log_stats, outputs, started)
        self.thread = threading.Thread(target=self._run, args=arguments, name="engine-core", daemon=True)
        self.thread.start()
        self.core = started.result()

    def _run(
        self, vllm_config: Any, executor_class: Any, log_stats: bool, outputs: Outputs, started: Future[ThreadCore]
    ) -> None:
        try:
            core = ThreadCore(vllm_config, executor_class, log_stats, outputs)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(core)
        try:
            core.run_busy_loop()
        except SystemExit:
            core.shutdown()
        except BaseException:
            logger.exception("the engine core failed")
        outputs.loop.call_soon_threadsafe(self._ended)

    def _receive(self, outputs: EngineCoreOutputs) -> None:
        if outputs.utility_output:
            _process_utility_output(outputs.utility_output, self.utility_results)
        elif outputs.outputs or outputs.scheduler_stats:
            self.outputs_queue.put_nowait(outputs)

    def _ended(self) -> None:
        self.resources.engine_dead = True
        self.outputs_queue.put_nowait(EngineDeadError())
        for future in self.utility_results.values():
            if not future.done():
                future.set_exception(EngineDeadError())

    def _ensure_output_queue_task(self) -> None:
        """Nothing to do: outputs arrive through the event loop."""

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        self.ensure_alive()
        self._calls += 1
        future = self.utility_results[self._calls] = asyncio.get_running_loop().create_future()
        self.core.input_queue.put((EngineCoreRequestType.UTILITY, (0, self._calls, method, args)))
        return await future

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.ensure_alive()
        request.client_index = 0
        self.core.input_queue.put((EngineCoreRequestType.ADD, self.core.preprocess_add_request(request)))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        if request_ids and not self.resources.engine_dead:
            self.core.aborts_queue.put_nowait(request_ids)
            self.core.input_queue.put((EngineCoreRequestType.ABORT, request_ids))

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True
        self.core.shutdown_state = EngineShutdownState.REQUESTED
        self.core.input_queue.put((EngineCoreRequestType.WAKEUP, None))


def run_core_on_a_thread() -> None:
    """Make AsyncLLM build ThreadClient instead of spawning an EngineCore. Needs VLLM_ENABLE_V1_MULTIPROCESSING=0."""

    def make(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> ThreadClient:
        return ThreadClient(vllm_config, executor_class, log_stats)

    EngineCoreClient.make_async_mp_client = staticmethod(make)  # type: ignore[method-assign]
