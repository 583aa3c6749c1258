# Installed as <custom_ops>/cmake/; the library and its header lie beside that folder.
if(NOT TARGET onnxslim_llm::ops)
  get_filename_component(_onnxslim_llm_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
  add_library(onnxslim_llm::ops SHARED IMPORTED)
  set_target_properties(onnxslim_llm::ops PROPERTIES
    IMPORTED_LOCATION "${_onnxslim_llm_root}/libonnxslim_llm_ops${CMAKE_SHARED_LIBRARY_SUFFIX}"
    INTERFACE_INCLUDE_DIRECTORIES "${_onnxslim_llm_root}/include")
  if(NOT EXISTS "${_onnxslim_llm_root}/libonnxslim_llm_ops${CMAKE_SHARED_LIBRARY_SUFFIX}")
    set(onnxslim_llm_ops_FOUND FALSE)
    set(onnxslim_llm_ops_NOT_FOUND_MESSAGE "this onnxslim-llm was installed without its compiled operators")
  endif()
  unset(_onnxslim_llm_root)
endif()
